"""The method as options: every field of seuf_core.method.Method, made from the model and from nothing else.

A command whose class is `MethodCommand` has them all, in panels, and finds what was given with `given(context)`.
They are made when that command is used, so that `seuf --help` loads no pydantic.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer
from typer.core import TyperCommand

from cli import options
from cli.errors import CommandError

if TYPE_CHECKING:
    from seuf_core.method import Method

_GIVEN: Final = "seuf.method"  # where a command's context keeps what was given
_SET: Final = "others"
_SET_OPTION: Final = typer.Option(
    "--set",
    help="The same as --name value, for any of these fields; may be repeated.",
    metavar="NAME=VALUE",
    rich_help_panel="Preset",
)
_WORDS: Final[dict[str, str]] = {"integer": "INT", "number": "NUMBER", "string": "TEXT"}
_LOW: Final = (("exclusiveMinimum", "<"), ("minimum", "<="))
_HIGH: Final = (("exclusiveMaximum", "<"), ("maximum", "<="))


class MethodCommand(TyperCommand):
    """A command with one option a field of the method, and --set."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own options, then the method's."""
        return [*super().get_params(ctx), *_method_options()]

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the method's options are not arguments of its function."""
        texts = {option.name: ctx.params.pop(option.name) for option in _method_options()}
        ctx.meta[_GIVEN] = _read(texts.pop(_SET), texts)
        return super().invoke(ctx)


def given(context: typer.Context) -> tuple[dict[str, Any], Method]:
    """The fields that were given, and the method they make.

    Raises:
        CommandError: a field out of range, or fields that do not go together; in the words of the service.
    """
    from pydantic import ValidationError

    from api.validation import field_errors
    from seuf_core.method import Method

    fields = cast("dict[str, Any]", context.meta[_GIVEN])
    try:
        return fields, Method.model_validate(fields)
    except ValidationError as error:
        placed = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        first, *more = field_errors(placed, fields)
        misfit = first["code"] == "method_misfit"  # one error a field, and its message names them all
        name = "" if misfit else first["pointer"].strip("/").replace("/", ".") + ": "
        count = f" (and {len(more)} more)" if more and not misfit else ""
        raise CommandError(f"{name}{first['detail']}{count}", first["fix"]) from error


def _read(others: list[str] | None, named: Mapping[str, str | None]) -> dict[str, Any]:
    """Named options and --set together; what was not given is left to the preset.

    Raises:
        CommandError: --set without a value or with an unknown name, or a field given twice.
    """
    from seuf_core.method import Method

    schema = Method.model_json_schema()
    texts = {name: text for name, text in named.items() if text is not None}
    for name, text in options.pairs(others, "--set"):
        field = name.replace("-", "_")
        if field not in named:
            near = difflib.get_close_matches(field, named, 1)
            fix = f"Did you mean {near[0]}?" if near else "seuf run --help shows them all."
            raise CommandError(f"{field} is not a field of the method.", fix)
        if field in texts:
            raise CommandError(f"{field} is given twice.", "Give it once.")
        texts[field] = text
    return {name: _value(_shape(schema, name), text) for name, text in texts.items()}


def _value(shape: Mapping[str, Any], text: str) -> Any:
    """The text of an option as the JSON value that its field takes; what does not fit is left to the model."""
    if shape.get("type") == "string" and "enum" not in shape:
        return text
    value = options.as_json(text)
    parts = [options.as_json(part) for part in text.split(",")]
    if "properties" in shape and not isinstance(value, dict):  # 0.5,0.2,0.3
        names = list(shape["properties"])
        if len(parts) != len(names):
            raise CommandError(f"{text!r} is not {','.join(names)}.", f"Write it as {shape['default']}.")
        return dict(zip(names, parts, strict=True))
    is_list = any(part.get("type") == "array" for part in shape.get("anyOf", ()))
    return parts if is_list and isinstance(value, (str, float)) else value


@cache
def _method_options() -> tuple[Any, ...]:
    """One option a field, made by typer from a signature that is made from the model."""
    from seuf_core.method import GROUPS, Method

    schema = Method.model_json_schema()
    parameters, panel = [], ""
    for name in Method.model_fields:
        panel = GROUPS.get(name, panel)
        shape = _shape(schema, name)
        option = typer.Option(help=_help(shape), metavar=_metavar(shape), rich_help_panel=panel)
        parameters.append(_parameter(name, Annotated[str | None, option]))
        if name == "preset":
            parameters.append(_parameter(_SET, Annotated[list[str] | None, _SET_OPTION]))

    def holder() -> None:
        """Only its signature is used."""

    holder.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(holder)
    made: list[Any] = typer.main.get_command(app).params
    return tuple(made)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shape(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The JSON schema of a field, a reference looked up."""
    field = dict(schema["properties"][name])
    if "$ref" in field:
        parts = schema["$defs"][field.pop("$ref").rsplit("/", 1)[1]]["properties"]
        field |= {"properties": parts, "default": ",".join(str(part["default"]) for part in parts.values())}
    return field


def words_of(shape: Mapping[str, Any]) -> list[str]:
    """The words that a field takes."""
    own = shape.get("enum") or ([shape["const"]] if "const" in shape else [])
    return [*own, *(word for part in shape.get("anyOf", ()) for word in words_of(part))]


def range_of(shape: Mapping[str, Any]) -> str:
    """The range of a field's number, such as `0 < x <= 100`; empty where there is none."""
    for part in (shape, *shape.get("anyOf", ()), shape.get("items", {})):
        low = next((f"{part[k]:.10g} {sign} " for k, sign in _LOW if k in part), "")
        high = next((f" {sign} {part[k]:.10g}" for k, sign in _HIGH if k in part), "")
        if low or high:
            return f"{low}x{high}"
        if part is not shape and "items" in part:
            return range_of(part)
    return ""


def _metavar(shape: Mapping[str, Any]) -> str:
    """What the option takes, in a word or two."""
    if "properties" in shape:
        return ",".join("NUMBER" for _ in shape["properties"])
    if "enum" in shape:
        return "CHOICE"
    kinds = [part.get("type") for part in shape.get("anyOf", (shape,)) if "const" not in part]
    words = words_of(shape) + [_WORDS.get(kind, "NUMBER,...") for kind in kinds if kind != "null"]
    return "|".join(words)


def _help(shape: Mapping[str, Any]) -> str:
    """Description, the choices that it does not name, range and default, as rich markup."""
    said, words = shape.get("description", ""), words_of(shape)
    unsaid = [word for word in words if not re.search(rf"\b{word}\b", said)]
    if len(unsaid) > 1:
        said = f"{said} One of {', '.join(unsaid)}."
    # Each choice that is explained on a line of its own, which typer makes of an empty one.
    one = f"`(?:{'|'.join(words)})`"
    said = re.sub(rf"[;,]? ?((?:{one} and )?{one}(?: =|:))", r"\n\n\1", said) if words else said
    default = "none" if shape["default"] is None else shape["default"]
    facts = "; ".join(fact for fact in (range_of(shape), f"default {default}") if fact)
    marked = re.sub(r"`([^`]+)`", r"[cyan]\1[/]", said.strip().replace("[", r"\["))
    return rf"{marked} [dim]\[{facts}][/]"
