"""The peers' benchmark: the same models, data, chains and draws by Pyrometer and by every library that is installed.

    pyrometer speed                                 every case, every tool
    pyrometer speed eight-schools --tools pyrometer,numpyro
    pip install pyrometer[peers]                    the libraries to compare with

`cases/` says what is timed, `tools/` who is; `worker` times one tool on one case in a process of its own, `run` puts
these in turns, `agreement` asks whether all sampled the same, `results` takes medians, `table` prints.
"""
