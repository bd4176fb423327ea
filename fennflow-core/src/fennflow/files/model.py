"""Content that is a pydantic model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json
from typing_extensions import override

from fennflow.exceptions import FileException
from fennflow.files.content import BaseContent, reasons_of
from fennflow.files.round_trips import first_difference, first_fault

M = TypeVar("M", bound=BaseModel)

# The classes that this process has made, by model. A stored object names its model, and is not
# trusted: the name is only looked up here, and nothing is imported by it.
_classes: dict[str, type[ModelContent[Any]]] = {}

_ADVICE = (
    "Give the field a serializer and a validator that fit, or store it otherwise. Nothing was sent."
)


class ModelContent(BaseContent, Generic[M]):
    """A pydantic model, stored as JSON and read back as the model.

    Write `ModelContent[Invoice]` somewhere in a program before it reads invoices: an unknown model
    is read back as `JsonContent`.

    Example:
        ```python
        from pydantic import BaseModel

        from fennflow.files import ModelContent


        class Invoice(BaseModel):
            number: int


        invoice = ModelContent[Invoice].from_content(Invoice(number=7), filename="7.json")
        print(invoice.data.decode(), invoice.content)
        #> {"number":7} number=7
        ```
    """

    default_media_type = "application/json"
    model: ClassVar[type[BaseModel] | None] = None

    def __init__(self, **values: Any) -> None:
        if self.model is None:
            message = "Name the model: ModelContent[YourModel].from_content(...)."
            raise FileException(message)
        super().__init__(**values)

    @classmethod
    @override
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Note which model a parametrised class is of."""
        super().__pydantic_init_subclass__(**kwargs)
        arguments = cls.__pydantic_generic_metadata__["args"]
        if arguments and isinstance(arguments[0], type):
            cls.model = arguments[0]
            _classes[_name(arguments[0])] = cls

    @classmethod
    def from_content(
        cls,
        model: M,
        *,
        filename: str | None = None,
        media_type: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """Build it from an instance of the model, by its aliases.

        The JSON is read back and compared first: secrets become asterisks in JSON, NaN becomes
        null, and fields may be excluded or have a different JSON form.

        Raises:
            FileException: it is of another class, has no JSON form, or would be read back
                differently; the message names the field.
        """
        if cls.model is not None and not isinstance(model, cls.model):
            message = f"{cls.__name__} holds {cls.model.__name__}, not {type(model).__name__}."
            raise FileException(message)
        wheres: list[str] = []
        for round_trip in (False, True):  # pydantic's round-trip form leaves out computed fields
            try:
                data = model.model_dump_json(by_alias=True, round_trip=round_trip).encode()
            except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
                field = f"{type(model).__name__}.{_first_fault(model)}".rstrip(".")
                message = f"{field} is not JSON-serialisable: {error}. {_ADVICE}"
                raise FileException(message) from error
            built = cls(
                data=data, filename=filename, media_type=media_type, metadata=metadata or {}
            )
            try:
                where = first_difference(model, built.content)
            except FileException as error:
                if round_trip:
                    message = (
                        f"{type(model).__name__} could not be read back from its JSON form, which is "
                        f"compared before it is stored: {error}. {_ADVICE}"
                    )
                    raise FileException(message) from None
                continue
            if where is None:
                return built
            wheres.append(where)
        field = f"{type(model).__name__}.{wheres[-1]}".rstrip(".")
        message = (
            f"{field} would be read back as another value: its JSON form does not hold it (a "
            f"secret, NaN, bytes in another encoding, an excluded field, an instance of a subclass). {_ADVICE}"
        )
        raise FileException(message)

    @property
    @override
    def content(self) -> M:
        """The model.

        Raises:
            FileException: the bytes are not valid for the model.
        """
        assert self.model is not None, "__init__ and from_variant ensure it"  # noqa: S101
        try:
            return cast("M", self.model.model_validate_json(self.data))
        except ValidationError as error:
            message = f"{self._name} is not a {self.model.__name__}: {reasons_of(error)}"
            raise FileException(message) from None

    @classmethod
    @override
    def variant(cls) -> str | None:
        return None if cls.model is None else _name(cls.model)

    @classmethod
    @override
    def from_variant(cls, variant: str) -> type[BaseContent] | None:
        return _classes.get(variant)


def _first_fault(model: BaseModel) -> str:
    """Return which field of a model has no JSON form, and where in it."""
    for name in type(model).model_fields:
        try:
            model.model_dump_json(include={name})
        except (ValueError, TypeError, RecursionError):
            inside = first_fault(getattr(model, name), to_json)
            return f"{name}.{inside}".rstrip(".")
    return ""


def _name(model: type[BaseModel]) -> str:
    return f"{model.__module__}.{model.__qualname__}"
