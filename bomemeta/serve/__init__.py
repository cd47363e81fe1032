"""Classifiers of many tenants over HTTP, on one trained network: a Ray Serve app (extra `serve`).

tenants.py    what is kept: a folder of versions for each tenant
desk.py       what is asked for: fit, add_examples, predict
web.py        the HTTP side and the page, without Ray
serving.py    both as deployments of Ray Serve; the only file that imports ray.serve
"""
