"""The merge service: an HTTP API and a page over the same recipes, plans and merges.

command    starts it: `python start.py`, or `llama-merge serve`
settings   what can be set, by file, environment and command line
server     HTTP: connections, patience, files (`sendfile`); `safety` who may ask, and how often
app        puts the parts together: `create_app(settings)`
api        the JSON API; `schemas` says what goes in, `views` what comes out, `downloads` of files
studio     the pages, from `templates/` and `static/`; `studio_methods` has the methods' words
core       what the service can do, whoever asks
requests   what a client asks for, as a recipe
registry   the models that there are, by id; `hub` those in the Hub's cache
planner    a process that reads models and plans merges, so that the server never does
store      experiments and their jobs, in SQLite
runner     starts a process for each job (`worker`), and takes care of those that died (`processes`)
results    the folders of results: which there is room for, and which have to go
archive    a folder as a ZIP that is never written down, of which any part can be asked for
log        what is said to whoever runs the service

The server itself opens no model and imports neither numba nor torch: it stays small.
"""
