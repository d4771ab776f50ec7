"""Error messages of the command line: one line that names the argument, the rule and the value."""

import difflib
import os
import pkgutil
import re
from pickle import UnpicklingError
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "JSM_NAMESPACE_RANK",
)  # those that Lightning reads, in its order

LOST_PROCESS = (
    "\nAnother process of this run has ended or cannot be reached; the last lines that it printed say why. Resume "
    "with --ckpt_path last; for predict, repeat the command."
)
# Advice for failures of the machine, by a phrase in the message of torch, gloo or NCCL.
RUNTIME_ADVICE = {
    "closed by peer": LOST_PROCESS,
    "reset by peer": LOST_PROCESS,
    "remote process exited": LOST_PROCESS,
    "Timed out waiting": LOST_PROCESS,
    "Connect timeout": LOST_PROCESS,
    "DataLoader worker": "\nA data loading process died, most often for lack of memory. Reduce data.num_workers or "
    "data.batch_size, and resume with --ckpt_path last.",
    "out of memory": "\nTo reduce memory, lower data.batch_size and raise --trainer.accumulate_grad_batches, or use "
    "--model.grad_checkpointing true or --trainer.precision bf16-mixed.",
}
# Words for the types in jsonargparse's messages.
TYPES = {
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a string",
    "<class 'dict'>": "a mapping such as {name: value}",
    "<class 'list'>": "a list",
    "List": "a list",
    "<class 'NoneType'>": "null",
    "PositiveInt": "an integer above 0",
    "NonNegativeInt": "an integer of at least 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number of at least 0",
    "ClosedUnitInterval": "a number between 0 and 1",
    "OpenUnitInterval": "a number above 0 and below 1",
}
# Lines of jsonargparse's messages that say nothing to users.
NOISE = re.compile(r"Parser key \"[^\"]*\":$|Does not validate|Subtypes:|Errors:|Problem with given class_path|"
                   r"Given value|Expected a path but")  # fmt: skip


def process_rank() -> int:
    """Return the rank of this process in a distributed run, without importing Lightning."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if os.environ.get(name)), 0))


def program_name() -> str:
    """Return the prefix of this process's messages."""
    rank = process_rank()
    return f"shunted-lit: rank {rank}" if rank else "shunted-lit"


def describe_error(error: Exception) -> str | None:
    """Return the line to print for an error that users can correct; None for a bug, which keeps its traceback."""
    message = shorten_message(str(error))
    if isinstance(error, (ValueError, OSError, UnpicklingError)):
        return message
    if isinstance(error, RuntimeError):
        advice = next((advice for phrase, advice in RUNTIME_ADVICE.items() if phrase in str(error)), None)
        return f"{message} {advice}" if advice else None
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # slow to import, so not at the top

    return message if isinstance(error, MisconfigurationException) else None


def shorten_message(message: str) -> str:
    """Return a message without the traceback of a data worker, the location in gloo, or jsonargparse's nesting."""
    if message.startswith("Caught "):
        message = re.split(r"^[\w.]*(?:Error|Exception): ", message, flags=re.MULTILINE)[-1].strip()
    message = re.sub(r"^\[\S+\.cc:\d+\] |This is typically caused by.*", "", message).strip()
    return explain_parser_error(message)


def explain_parser_error(message: str) -> str:
    """Return one line for jsonargparse's report of the types that it tried; other messages are returned unchanged."""
    key = ".".join(re.findall(r'Parser key "([^"]+)":', message))
    if not key:  # raised by a class of this package
        raised = re.findall(r"^  - (?!Expected a )(.+?)(?=^  - |^Given value)", message, re.MULTILINE | re.DOTALL)
        return raised[0].strip() if raised else message
    if innermost := re.search(r"^.*(?:Got value|Given value):.*$|^ *Not of type .*$", message, re.MULTILINE):
        message = message[: innermost.end()]  # what follows belongs to the arguments around it
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    reasons = [line for line in lines if line and not NOISE.match(line)]
    unknown = next((reason for reason in reasons if not reason.startswith(("Expected a ", "Not of type "))), None)
    if unknown is None:
        return explain_type_error(key, message, reasons)
    if option := re.match(r"Option '(.+)' is not accepted", unknown):
        classes = re.findall(r"Problem with given class_path '([^']+)'", message)
        if key == "optimizer" and classes[-1:] == ["torch.optim.Optimizer"]:
            return explain_unnamed_optimizer(option[1])
        owner = suggest_argument(classes[-1], key, option[1]) if classes else "this command"
        return f"`{key}.{option[1]}` is not an argument of {owner}"
    if required := re.match(r"the following arguments are required: (.+)", unknown):
        options = " and ".join(f"--{key}.{name}" for name in required[1].split(", "))
        return f"`{key}` lacks required arguments: pass {options}"
    return re.sub(r'^Parser key "[^"]*":', f"`{key}`:", unknown) if "Parser key" in unknown else f"`{key}`: {unknown}"


def explain_unnamed_optimizer(argument: str) -> str:
    """Return one line for an argument of an optimizer that has no class, or is not in `init_args`."""
    if argument == "class_path":
        return "`optimizer` must have its arguments in init_args: {class_path: CLASS, init_args: {lr: 0.1}}"
    return (
        f"`optimizer.{argument}` needs the class of the optimizer: --optimizer CLASS --optimizer.{argument} ...; "
        "options of the default optimizer are options of the model, such as --model.lr"
    )


def explain_type_error(key: str, message: str, reasons: list[str]) -> str:
    """Return one line for a value that has none of the types of its argument."""
    takes_value = re.search(r"Expected a <class '(?!NoneType)", message)  # as the tensor or number of an optimizer
    if not takes_value and (missing := re.search(r"Expected a dot import path string: (.*)", message)):
        return f"`{key}`: there is no class {missing[1]!r}{suggest_class(key, missing[1])}"
    expected: list[str] = []
    choices: list[str] = []
    for reason in reasons:
        if reason.startswith("Expected a dot import path"):
            continue
        name = re.match(r"(?:Expected a|Not of type) ([^:]+?)(?:: .*|\. Got value: .*)?$", reason)
        words = TYPES.get(name[1], f"a {name[1]}".replace("typing.", "")) if name else reason
        literal = re.fullmatch(r"a Literal\[(.*)\]", words)
        (choices if literal else expected).append(literal[1] if literal else words)
    if choices:
        expected.insert(0, f"one of {', '.join(choices)}")
    value = re.search(r"(?:Got|Given) value: (.*)|Not of type \w+: (.+) does not conform|: ('.*')$", message, re.M)
    given = next((group for group in value.groups() if group is not None), "") if value else ""
    if nested := re.fullmatch(r"NestedArg\(key=.*, val=(.*)\)", given):
        given = nested[1]
    given = given if len(given) <= 80 else f"{given[:77]}..."
    return f"`{key}` must be {' or '.join(dict.fromkeys(expected))}, got {given}"


def suggest_argument(class_path: str, key: str, name: str) -> str:
    """Return the name of a class, and a hint at its arguments."""
    cls = pkgutil.resolve_name(class_path)
    close = difflib.get_close_matches(name, ArgumentParser().add_class_arguments(cls, fail_untyped=False), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{cls.__name__}; {hint}`--{key}.help={cls.__name__}` lists its arguments."


def suggest_class(key: str, name: str) -> str:
    """Return a hint at a class with a similar name: of this package, of an optimizer or of a scheduler."""
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from shunted_lit import data, tasks

    bases = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}
    known = subclass_names(bases[key]) if key in bases else [*tasks.__all__, *data.__all__]
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; pass the name of a class, or its import path."


def subclass_names(base: type) -> list[str]:
    """Return the names of all subclasses of a class that have been imported."""
    classes: list[type] = base.__subclasses__()
    return [name for cls in classes for name in (cls.__name__, *subclass_names(cls))]


class CommandParser(ArgumentParser):
    """Argument parser that reports an error in one line, without the usage of all arguments."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a class within the arguments: jsonargparse collects its message
            super().error(message, ex)
        parser: Any = getattr(ex, "parser", None) or self
        prog = parser.prog.replace("[options] ", "")
        message = " ".join(shorten_message(message).replace('in "<unicode string>", ', "at ").split())
        if unknown := re.match(r"unrecognized arguments: (--[\w.]+)", message):
            close = difflib.get_close_matches(unknown[1], re.findall(r"--[\w.]+", parser.format_help()), n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        elif required := re.match(r"the following arguments are required: (?:(fit|validate|test|predict)\.)?", message):
            prog = f"shunted-lit {required[1]}" if required[1] else prog
            message = f"required arguments are missing: {message[required.end() :].replace(f'{required[1]}.', '')}"
        hint = "" if message.endswith("?") or ".help=" in message else f"; see `{prog} --help`."
        self.exit(2, f"{program_name()}: error: {message.rstrip('.') if hint else message}{hint}\n")
