"""Finding a user's function: `module:function` or `file.py:function`. Rewards and data functions come through here."""

import difflib
import importlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(spec: str, base_dir: Path) -> Callable[..., Any]:
    """Return the callable that `spec` names.

    spec: `package.module:function`, or `path/file.py:function` with the path read from `base_dir` (the recipe's
    folder). A file's own folder goes to the end of `sys.path`, so that it may import its neighbours; two specs of
    one file share one module.

    Raises ValueError that names spec, file, line and cause: malformed spec, no such file or module, a failing
    import, no such function (the nearest name is offered), something that cannot be called."""
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(f"{spec!r} does not name a function: write `module:function` or `file.py:function`")
    path = (base_dir / source).resolve() if source.endswith(".py") else None
    if path is not None and not path.is_file():
        others = [other.name for other in path.parent.glob("*.py")]
        raise ValueError(f"{spec!r}: no such file: {path}{nearest(path.name, others)}")
    try:
        module = importlib.import_module(source) if path is None else _from_file(path)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way, a script may even call exit()
        raise ValueError(f"{spec!r}: importing {source} failed: {describe_error(error, path and str(path))}") from error
    try:
        function = getattr(module, name)  # not vars(): packages that load lazily have their names in no dict
    except AttributeError:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{spec!r}: {source} has no function {name!r}{nearest(name, functions)}") from None
    if not callable(function):
        raise ValueError(f"{spec!r}: {name!r} of {source} is a {type(function).__name__}, not a function")
    return function


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name most like `name`, else the known names, else nothing."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


def describe_error(error: BaseException, file: str | None) -> str:
    """`ValueError: what it says (rules.py, line 12: the line)`: the deepest line in `file` on the way to the error.
    Without a file: the deepest line that is not the import system's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    own = [f for f in frames if (f.filename == file if file else f.filename not in (__file__, importlib.__file__))]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _from_file(path: Path) -> ModuleType:
    # Not the bare stem: a user's `math.py` or `code.py` must not stand for the standard library's.
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # before execution, as the import system does: dataclasses and pickle look it up
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
