"""The configuration: what can be set, what a value may be, how it is loaded and shown, files with secrets.

Importers name the file (`from proxy.settings.load import load`): this one exports nothing.
"""
