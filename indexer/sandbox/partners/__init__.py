"""Partner APIs as the fact sheets describe them: Keyban, qiibee and Loyfin, seeded, with faults on demand.

Plain objects: a request and the injected time in, a reply out; no socket, no sleep, no clock of their own. A simulation asks
them in process, `app.py` serves them over HTTP. Each keeps the truth of what really moved, for whoever judges.
"""
