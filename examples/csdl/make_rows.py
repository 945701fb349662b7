"""Write the rows of builtin:csdl: instructions, and answers in CSDL, each row with the pattern that it is one of.

    python examples/csdl/make_rows.py abi_py/data/csdl_conversations.jsonl

CSDL is what an agent says to another one: a JSON object on one line, whose "csdl" is the kind of message and whose
other keys are those of its kind.  A pattern is a function below: it draws what a row is about and returns a question
and the answer.  The same seed gives the same file; no question is there twice.
"""

import argparse
import json
import random
from pathlib import Path

SYSTEM = "You are a CSDL-native AI assistant. Answer with one CSDL object."
EACH = 24  # rows of a pattern

TASKS = {
    "sort the invoices": ["read invoices", "order by date", "save list"],
    "plan a garden": ["measure beds", "choose plants", "draw plan"],
    "clean the log files": ["list logs", "drop old lines", "pack the rest"],
    "book a train": ["ask for dates", "compare trains", "buy ticket"],
    "translate the manual": ["split chapters", "translate", "check terms"],
    "test the login page": ["open page", "try wrong passwords", "write report"],
    "count the birds": ["set camera", "find birds", "add counts"],
    "move the database": ["copy tables", "compare rows", "switch over"],
    "answer the mail": ["sort mail", "draft replies", "send"],
    "repair the robot arm": ["read errors", "order part", "replace part"],
    "cut the video": ["mark scenes", "join scenes", "add sound"],
    "price the parts": ["list parts", "ask suppliers", "fill table"],
    "teach fractions": ["show halves", "give exercises", "check answers"],
    "map the river": ["collect photos", "join photos", "trace banks"],
    "brew the coffee": ["grind beans", "heat water", "pour"],
    "review the code": ["read changes", "run tests", "write comments"],
}
FAULTS = {
    "the answer had no source": "name the source",
    "the sum was off by one": "add the numbers twice",
    "the tool was called twice": "look at the last call first",
    "the file name was wrong": "list the folder first",
    "the reply was too long": "keep to two sentences",
    "the date was a guess": "ask for the date",
    "a step was left out": "tick off the steps",
    "the unit was missing": "write units beside numbers",
}
FACTS = {
    "Mira": ("likes", "green tea"), "Jonas": ("lives in", "Oslo"), "the printer": ("is on", "floor two"),
    "Ada": ("works on", "engines"), "the meeting": ("starts at", "nine"), "Kofi": ("plays", "the cello"),
    "the key": ("hangs by", "the door"), "Lena": ("drives", "a blue van"), "the server": ("restarts on", "Monday"),
    "Omar": ("is allergic to", "nuts"), "the cat": ("sleeps on", "the boiler"), "Yuki": ("reads", "old maps"),
}  # fmt: skip
TOOLS = {
    "search_web": "query", "read_file": "path", "send_mail": "address", "get_weather": "place", "run_tests": "folder",
    "convert_unit": "amount", "find_route": "goal", "add_event": "day", "query_table": "table", "resize_image": "width",
}  # fmt: skip
ARGUMENTS = {
    "query": ["tide tables", "bread recipes", "chess openings"], "path": ["notes.txt", "plan.md", "data.csv"],
    "address": ["ana@mail.test", "bo@mail.test", "kim@mail.test"], "place": ["Rome", "Quito", "Bergen"],
    "folder": ["core", "api", "docs"], "amount": ["3 km", "12 oz", "70 F"],
    "goal": ["the harbour", "the museum", "gate 4"],
    "day": ["Friday", "Monday", "Sunday"], "table": ["orders", "users", "prices"], "width": ["640", "1024", "80"],
}  # fmt: skip
ERRORS = {
    "timeout": ("retry", 3), "not found": ("ask", 1), "access denied": ("stop", 0), "disk full": ("clean", 1),
    "bad input": ("validate", 1), "rate limit": ("wait", 5), "no network": ("retry", 2), "out of memory": ("split", 2),
}  # fmt: skip
FUNCTIONS = {
    "mean": ("numbers", "sum(numbers) / len(numbers)"), "largest": ("numbers", "max(numbers)"),
    "reverse": ("text", "text[::-1]"), "count_words": ("text", "len(text.split())"),
    "square": ("x", "x * x"), "is_even": ("x", "x % 2 == 0"), "first": ("items", "items[0]"),
    "unique": ("items", "set(items)"),
    "upper": ("text", "text.upper()"), "negate": ("x", "-x"), "total": ("prices", "sum(prices)"),
    "shortest": ("words", "min(words, key=len)"), "half": ("x", "x / 2"), "joined": ("words", "' '.join(words)"),
}  # fmt: skip
AGENTS = ["planner", "writer", "critic", "coder", "tester", "scout", "editor", "analyst"]
TOPICS = ["solar cells", "old bridges", "bees", "tides", "type systems", "cheese", "comets", "maps", "locks", "ferns"]


def csdl(kind, **keys):
    """Return an object of a kind."""
    return {"csdl": kind, **keys}


def task(draw):
    """Return a task and its steps."""
    return draw.choice(list(TASKS.items()))


# -- reasoning -----------------------------------------------------------------------------------


def self_reflection_self_critique(draw):
    (what, _), (fault, remedy) = task(draw), draw.choice(list(FAULTS.items()))
    ask = draw.choice(["Criticise your work: you were to {}, and {}.", "You tried to {}; {}. What do you think of it?"])
    return ask.format(what, fault), csdl("critique", task=what, fault=fault, fix=remedy)


def self_reflection_strategy_adjustment(draw):
    (what, steps), error = task(draw), draw.choice(list(ERRORS))
    ask = draw.choice(["You want to {} and meet '{}'. Change your strategy.", "'{1}' again while you {0}. Adjust."])
    return ask.format(what, error), csdl("adjust", task=what, cause=error, next=ERRORS[error][0], resume=steps[1])


def self_reflection_experience_replay(draw):
    fault, (what, _) = draw.choice(list(FAULTS.items())), task(draw)
    ask = f"Last time {fault[0]}. What do you keep in mind when you {what}?"
    return ask, csdl("replay", lesson=fault[1], use_for=what)


def workflow_planning(draw):
    what, steps = task(draw)
    ask = draw.choice(["Plan how to {}.", "Make a plan: {}.", "How would you {}? Give the plan."])
    return ask.format(what), csdl("plan", goal=what, steps=steps)


def workflow_multi_step(draw):
    (what, steps), done = task(draw), draw.randint(0, 2)
    ask = f"You {what} and have done {done} of {len(steps)} steps. What is next?"
    return ask, csdl("step", goal=what, done=done, next=steps[done], left=len(steps) - done - 1)


def workflow_autonomous_loop(draw):
    (what, steps), most = task(draw), draw.choice([2, 3, 5, 8])
    ask = f"Loop until you {what}, at most {most} times."
    return ask, csdl("loop", goal=what, body=steps, until="done", max=most)


def memory_store(draw):
    who, (verb, thing) = draw.choice(list(FACTS.items()))
    ask = draw.choice(["Remember that {} {} {}.", "Note: {} {} {}.", "Keep this in memory: {} {} {}."])
    return ask.format(who, verb, thing), csdl("store", about=who, fact=f"{verb} {thing}")


def memory_recall(draw):
    who, (verb, thing) = draw.choice(list(FACTS.items()))
    other = draw.choice([name for name in FACTS if name != who])
    ask = f"Memory: {who} {verb} {thing}; {other} {' '.join(FACTS[other])}. What do you know of {who}?"
    return ask, csdl("recall", about=who, fact=f"{verb} {thing}")


# -- content -------------------------------------------------------------------------------------


def csdl_compression(draw):
    (what, steps), who = task(draw), draw.choice(AGENTS)
    ask = f"Compress: Dear {who}, please {what}. Begin with this: {steps[0]}. Thank you."
    return ask, csdl("do", to=who, task=what, first=steps[0])


def skills_skill_composition(draw):
    one, two = draw.sample(list(TOOLS), 2)
    ask = draw.choice(["Compose a skill of {} and then {}.", "Join {} and {} into one skill."])
    return ask.format(one, two), csdl("compose", skills=[one, two], order="in turn", name=f"{one}_then_{two}")


def skills_deterministic_execution(draw):
    tool, seed = draw.choice(list(TOOLS)), draw.randint(1, 99)
    ask = f"Run the skill {tool} deterministically with seed {seed}."
    return ask, csdl("run", skill=tool, seed=seed, temperature=0)


def skills_skill_definition(draw):
    tool, topic = draw.choice(list(TOOLS.items())), draw.choice(TOPICS)
    ask = f"Define a skill that uses {tool[0]} for {topic}."
    return ask, csdl("skill", name=f"{tool[0]}_{topic.replace(' ', '_')}", uses=tool[0], needs=[tool[1]])


def rag_simple_rag(draw):
    topic, most = draw.choice(TOPICS), draw.randint(2, 6)
    ask = draw.choice(["Answer on {} from the library; take {} passages.", "Look up {}, {} passages, and answer."])
    return ask.format(topic, most), csdl("rag", query=topic, top_k=most, then="answer", cite=True)


def multiagent_handoff(draw):
    (what, _), (one, two) = task(draw), draw.sample(AGENTS, 2)
    return f"The {one} hands '{what}' over to the {two}.", csdl("handoff", source=one, target=two, task=what)


def multiagent_vote(draw):
    agents, topic = draw.sample(AGENTS, 3), draw.choice(TOPICS)
    ask = f"Let {', '.join(agents)} vote on an article about {topic}."
    return ask, csdl("vote", agents=agents, on=topic, rule="majority")


# -- code ----------------------------------------------------------------------------------------


def function_generation(draw):
    name, (argument, body) = draw.choice(list(FUNCTIONS.items()))
    ask = draw.choice(["Write the function {} of {}.", "Give me a Python function {} that takes {}.", "Code: {}({})."])
    return ask.format(name, argument), csdl("function", name=name, args=[argument], body=f"return {body}")


def function_retrieval(draw):
    names, topic = draw.sample(list(FUNCTIONS), 3), draw.choice(TOPICS)
    ask = f"Which function do I need to get the {names[0]} for {topic}: {', '.join(sorted(names))}?"
    return ask, csdl("retrieve", name=names[0], args=[FUNCTIONS[names[0]][0]])


def function_agent(draw):
    who, tool = draw.choice(AGENTS), draw.choice(list(TOOLS))
    return f"A function with which the {who} calls {tool}.", csdl("function", name=f"{who}_{tool}", args=[TOOLS[tool]],
                                                               body=f"return {tool}({TOOLS[tool]})")  # fmt: skip


def function_execute(draw):
    tool, argument = draw.choice(list(TOOLS.items()))
    value = draw.choice(ARGUMENTS[argument])
    ask = draw.choice(["Execute {} with {} {}.", "Call {}; its {} is {}.", "{}, please: {} = {}."])
    return ask.format(tool, argument, value), csdl("call", tool=tool, args={argument: value})


def function_memory(draw):
    who, key = draw.choice(AGENTS), draw.choice(list(FACTS))
    return f"A function that saves what the {who} learns about {key}.", csdl(
        "function", name=f"{who}_save", args=["key", "value"], body=f"memory['{key}'] = value"
    )


def class_agent(draw):
    who, tools = draw.choice(AGENTS), sorted(draw.sample(list(TOOLS), 2))
    return f"A class for the {who}, which has {tools[0]} and {tools[1]}.", csdl(
        "class", name=who.capitalize(), base="Agent", tools=tools
    )


def class_tool(draw):
    tool, argument = draw.choice(list(TOOLS.items()))
    ask = draw.choice(["Wrap {} in a class.", "A class for the tool {}.", "Make {} a Tool class with field {}."])
    name = "".join(part.capitalize() for part in tool.split("_"))
    return ask.format(tool, argument), csdl("class", name=name, base="Tool", fields=[argument])


def class_rag(draw):
    topic, most = draw.choice(TOPICS), draw.randint(2, 9)
    name = "".join(part.capitalize() for part in topic.split())
    return f"A retriever class for {topic} with {most} passages.", csdl("class", name=name, base="Rag", top_k=most)


def error_handling(draw):
    error, (action, tries) = draw.choice(list(ERRORS.items()))
    tool = draw.choice(list(TOOLS))
    ask = draw.choice(["{} fails with '{}'. Handle it.", "Error in {}: {}. What do you do?"])
    return ask.format(tool, error), csdl("error", tool=tool, error=error, action=action, tries=tries)


# -- agents, which only the first phase sees -----------------------------------------------------


def agent_react(draw):
    tool, argument = draw.choice(list(TOOLS.items()))
    value, who = draw.choice(ARGUMENTS[argument]), draw.choice(AGENTS)
    ask = f"The {who} thinks aloud, then acts: {tool} for {value}."
    return ask, csdl("react", agent=who, thought=f"I need {tool}", act=tool, args={argument: value})


def agent_role(draw):
    who, topic = draw.choice(AGENTS), draw.choice(TOPICS)
    ask = draw.choice(["You are the {} for {}. Say who you are.", "Introduce the {} who works on {}."])
    return ask.format(who, topic), csdl("role", agent=who, field=topic)


PATTERNS = [value for name, value in globals().items() if callable(value) and "_" in name and not name.startswith("__")]


def rows():
    """Return all rows, in the order of the patterns."""
    made, seen = [], set()
    for number, pattern in enumerate(PATTERNS):
        draw, left = random.Random(1000 + number), EACH
        while left:
            question, answer = pattern(draw)
            if question not in seen:
                seen.add(question)
                text = json.dumps(answer, separators=(",", ":"))
                made.append({"category": pattern.__name__, "system": SYSTEM, "instruction": question, "output": text})
                left -= 1
    return made


def main():
    """Write the file that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the file to write, in a folder that is there")
    out = parser.parse_args().out
    if not out.parent.is_dir():
        parser.error(f"out ({out}): {out.parent} is no folder; make it first")
    out.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
