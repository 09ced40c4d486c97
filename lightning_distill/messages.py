"""What the parser of the command line says of a value that does not do, in a line that names option, value and reason."""

from __future__ import annotations

import re
import textwrap

UNION = "Does not validate against any of the Union subtypes"
#: What is said of a type that was plainly not meant: others are about the value.
OF_TYPES = (
    "Expected a <class ",
    "Expected a dot import path string: ",
    "Expected a path but ",
    "Not a valid subclass of ",
    "Type collections.abc.Callable[",
)
CALLABLE = re.compile(r"Type .+? expects a function or a callable class: (.+?)(?:\. Got value: (.*))?", re.DOTALL)


def in_a_line(message: str, option: str = "") -> str:
    """jsonargparse's message, which tells of every type that was tried, as what is wrong with the value as that type which was meant.

    Args:
        message: of ``ArgumentParser.error``, of an exception of ``instantiate``, or a part of one.
        option: what it is about, as it is typed.
    """
    text = textwrap.dedent(message).strip()
    if found := re.match(r'Parser key "([^"]+)":\n', text):
        return in_a_line(text[found.end() :], f"{option}.{found[1]}".lstrip("."))
    tried, _, value = text.partition("\nGiven value type:")
    if text.startswith((UNION, "- ")):
        reasons = _items(tried.partition("\nErrors:\n")[2] or tried)
        value = value.partition("Given value: ")[2]
        if about_it := [reason for reason in reasons if not reason.startswith(OF_TYPES)]:
            # What is said of a part of the value, or by the class that it is given to, names that itself.
            names_it = "\n" in value or not option or about_it[0].startswith(("Parser key", "Problem with", UNION))
            return in_a_line(about_it[0], option if names_it else f"{option}={value}")
        for reason in reasons:
            if found := re.fullmatch(r"Expected a dot import path string: (.+)", reason):
                return f"{option}={found[1]}: neither a class path nor the name of a class that is known here"
        return in_a_line("; ".join(reason for reason in reasons if "NoneType" not in reason), f"{option}={value}")
    if found := re.match(r"Problem with given class_path '(\S+)':\n", text):
        return _of_a_class(text[found.end() :], option, found[1])
    if found := CALLABLE.fullmatch(text):
        given = re.search(r"class_path='(\S+?)'", found[2] or "")
        return _of_a_class(found[1], option, given[1] if given else "")
    plain = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", " ".join(text.split()))
    return f"{option}: {plain}" if option else plain


def _of_a_class(message: str, option: str, path: str) -> str:
    """What is said of a class's arguments, as of options of the command line."""
    text = textwrap.dedent(message).strip()
    if found := re.match(r"Option '([\w.]+)' is not accepted", text):
        return f"Option '{option}.{found[1]}' is not accepted by {path}"
    if found := re.fullmatch(r"the following arguments are required: (.+)", text):
        return f"{', '.join(f'{option}.{name}' for name in found[1].split(', '))}: not given, and needed by {path}"
    if text.startswith(("Parser key", UNION)):
        return in_a_line(text, option)
    return in_a_line(text, "=".join(filter(None, (option, path))))


def _items(bullets: str) -> list[str]:
    """The items of a list; lists within an item stay in it."""
    parts = (item.partition("\n") for item in re.split(r"^- ", textwrap.dedent(bullets), flags=re.MULTILINE)[1:])
    return [f"{first}\n{textwrap.dedent(rest)}".strip() for first, _, rest in parts]
