"""The topics of the labelled text sources: fixed tables, so class ids never move."""

from __future__ import annotations

LEXICOGRAPHER_FILES = (
    *("adj.all", "adj.pert", "adv.all", "noun.tops", "noun.act", "noun.animal", "noun.artifact"),
    *("noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event"),
    *("noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object"),
    *("noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process"),
    *("noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time"),
    *("verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition"),
    *("verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather"),
    "adj.ppl",
)
"""WordNet's 45 lexicographer files, in the order of their numbers (manual page lexnames(5WN))."""

STDLIB_TOPICS: dict[str, tuple[str, ...]] = {
    "other": (),
    "concurrency": (
        *("asyncio", "concurrent", "multiprocessing", "threading", "queue", "subprocess", "sched"),
        *("selectors", "contextvars", "asyncore", "asynchat", "socketserver", "_threading_local"),
    ),
    "codecs": ("encodings", "codecs", "base64", "quopri", "uu", "binhex", "stringprep", "locale"),
    "mail": ("email", "mailbox", "mailcap", "mimetypes", "smtplib", "smtpd", "imaplib", "poplib"),
    "web": ("http", "urllib", "html", "xml", "xmlrpc", "wsgiref", "cgi", "cgitb", "ftplib", "ssl"),
    "windows": ("tkinter", "idlelib", "turtle", "turtledemo", "curses", "_pyrepl"),
    "compiler": (
        *("lib2to3", "ast", "dis", "opcode", "tokenize", "token", "symtable", "pyclbr", "inspect"),
        *("compileall", "py_compile", "importlib", "pkgutil", "zipimport", "runpy", "modulefinder"),
    ),
    "packaging": ("distutils", "ensurepip", "venv", "site", "sysconfig", "zipapp", "pydoc_data"),
    "testing": ("unittest", "doctest", "pdb", "bdb", "trace", "cProfile", "profile", "pstats"),
    "data": ("json", "csv", "sqlite3", "pickle", "pickletools", "plistlib", "tomllib", "dbm"),
    "numbers": (
        "statistics",
        "fractions",
        "decimal",
        "_pydecimal",
        "random",
        "numbers",
        "datetime",
    ),
    "foreign": ("ctypes", "_sysconfigdata", "re", "sre_parse", "sre_compile", "struct"),
    "files": ("pathlib", "shutil", "tarfile", "zipfile", "tempfile", "glob", "os", "ntpath", "io"),
}
"""Topic -> top-level packages and modules of Python's standard library; "other" takes the rest."""

_TOPIC_OF = {name: index for index, names in enumerate(STDLIB_TOPICS.values()) for name in names}


def stdlib_topic(path: str) -> int:
    """Topic of a file at ``path`` below the library's folder, e.g. ``email/header.py``."""
    top = path.split("/", 1)[0].removesuffix(".py")
    return _TOPIC_OF.get(top, 0)
