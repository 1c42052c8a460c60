"""Tests that train, compile, start processes or look at CIFAR-10 get the marker `training`, which `make test-fast` leaves out.

Nobody has to remember to set it: a test is marked if its code, that of a helper which it calls in its module, or that of a fixture
which it uses, names one of HEAVY.
"""
import inspect

import pytest

HEAVY = {"train", "fit", "demo", "run_loop", "subprocess", "Popen", "spawn", "get_context", "torchrun", "browser", "compile", "cifar10",
         "compiled", "TRIALS", "train_model", "correctness", "onnxruntime", "torchmetrics", "diffusers"}


def words(function, module, seen):
    "All names and strings in a function's code and in that of the helpers that it calls from its own module."
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or code in seen:
        return set()
    seen.add(code)
    found, parts = set(), [code]
    while parts:
        part = parts.pop()
        found |= set(part.co_names) | {constant for constant in part.co_consts if isinstance(constant, str)}
        parts += [constant for constant in part.co_consts if inspect.iscode(constant)]
    for name in sorted(found & vars(module).keys()):
        helper = getattr(module, name)
        if inspect.isfunction(helper) and helper.__module__ == module.__name__:
            found |= words(helper, module, seen)
    return found


def is_heavy(item):
    "Whether a collected test does one of these things, as far as its source tells."
    functions = [item.function, *(fixture[-1].func for fixture in item._fixtureinfo.name2fixturedefs.values())]
    return any(HEAVY & words(function, inspect.getmodule(function), set()) for function in functions
               if getattr(inspect.getmodule(function), "__file__", "").startswith(str(item.path.parent)))


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "function") and is_heavy(item):
            item.add_marker(pytest.mark.training)
