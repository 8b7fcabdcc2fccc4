"""What fastattn touches of FastDeploy 2.x, for tests: its interface, and none of its code.

It is importable where its parent folder is in ``sys.path``. Like FastDeploy it loads plug-ins where
``FD_PLUGINS`` names them, resolves a backend's class from a dotted name that its platform tells,
and keeps what it resolved.
"""
