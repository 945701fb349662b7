"""The layers of which a model is a list: the embedding, residual branches, the head.

layer.py          what a layer is: its tensors, the arrays it saves and needs, and what a pass tells it
embedding.py      ids to rows
attention.py      x + attention(norm(x))
feed_forward.py   x + swiglu(norm(x))
head.py           the last norm, the logits, and their loss in one operation
norm.py           the norm at the beginning of a branch
linear.py         y = x Wᵀ: parts that read the same x, with biases and adapters
"""
