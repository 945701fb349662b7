"""Runs: what the settings of a training run mean, and what it is made of, for the command line and for programs alike.

    settings.py       the sections of a run, RunConfig, config.yaml
    derived.py        a setting that follows from others: its rule as text, and as a function
    defaults.py       the defaults of a new run, and the table of what is derived
    resolve.py        flags beat file beats defaults, derived settings follow: once
    directory.py      what a run's directory holds, and who may write there
    resuming.py       the settings of a run that goes on      schedule.py  its learning-rate schedule
    conversations.py  files of conversations as rows that are trained on
    base.py           the model that a run starts from
    opening.py        what --data, --valid-data and --tokenizer name
    shipped.py        the conversations of the package, by name      new_tokenizer.py  a tokenizer trained on the data
    run.py            settings, data and directory together
    plan.py           the memory and the time that it will need
    samples.py        what a model writes while it is trained
    models.py         a trained model, its tokenizer, the settings of generation
    finishing.py      what a run leaves at its end: RUN/model
    companions.py     what makes that folder whole beside the weights     model_card.py  and its README.md
    exporting.py      a model in another form; exporting_adapters.py  adapters alone; export_source.py  what they take
    measuring.py      how well it predicts
    recorded.py       what a run's directory tells about it         comparing.py  several runs side by side
    curves.py         curves in a picture
    inspecting/       what a file or folder is, of ours or of others
    compiling.py      kernels compiled ahead, in parallel processes; compile_worker.py  inside one of them

Nothing here prints, and nothing knows the command line; `cli/` and `pipelines/` stand on it.

    given = Given({"training": {"epochs": 3}, "data": {"path": ("notes.txt",)}}, {})
    run = given.resolve(given.open_data(), Path("my-run"))   # in its config nothing is left open
"""
