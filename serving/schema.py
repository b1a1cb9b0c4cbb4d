"""What requests and responses may hold: limits, pydantic models, and the schema of a record from the fitted columns."""

import json
import re
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, FailFast, Field, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from errors import UserError, did_you_mean
from preprocessing.cleaning import replace_surrogates

MAX_RECORDS = 1_000  # per request
MAX_VALUES = 1_000_000  # per JSON body: parsing more would block all other requests
MAX_WARNINGS = 100  # in a response
MAX_TEXT = 100_000  # characters of a text, or of any other cell
LONE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON: perhaps half of a surrogate pair


def parse_json(raw: bytes):
    """Parse a request body. Raises UserError for invalid JSON, which includes NaN and Infinity."""
    if sum(map(raw.count, b",[{")) > MAX_VALUES:
        raise UserError(f"the request body has more than {MAX_VALUES:,} values.")
    try:
        text = raw.decode(json.detect_encoding(raw))  # json.loads itself would accept invalid UTF-8
        body = DECODER.decode(text)
        return json.loads(replace_surrogates(json.dumps(body, ensure_ascii=False))) if LONE.search(text) else body
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request body is not valid JSON: {str(error)[:200]}") from None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number; use null for an empty cell")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # once: json.loads would make one for each request


# ---------------------------------------------------------------- cells and records


def _check_cell(cell):
    """Validate a cell. A column parses its cells itself, so that its messages can name what it expects."""
    if isinstance(cell, (dict, list)):
        raise PydanticCustomError("cell", "a cell must be a number, a string, true, false or null")
    if isinstance(cell, str) and len(cell) > MAX_TEXT:
        raise PydanticCustomError("cell", f"{len(cell):,} characters; at most {MAX_TEXT:,} are allowed")
    if isinstance(cell, int) and abs(cell) > 2**53:
        if abs(cell) >= 2**63:
            raise PydanticCustomError("cell", "the number is too large")
        return str(cell)  # pandas stores a column of integers and empty cells as floats, which would round it
    return cell


Cell = Annotated[Any, PlainValidator(_check_cell), WithJsonSchema({})]


def _check_pattern(schema: dict, cell):
    """Validate a cell that must match a pattern, such as a data URL. Bytes come from uploaded files."""
    if isinstance(cell, bytes) or (isinstance(cell, str) and re.match(schema["pattern"], cell)):
        return cell
    raise PydanticCustomError("cell", f"must be {schema.get('description', 'a matching string')}")


class RecordSchema:
    """The columns of a pipeline as a pydantic type: validates records and describes them as JSON schema."""

    def __init__(self, pipeline):
        preprocessor, columns, self.example = pipeline.preprocessor, {}, {}
        for column in preprocessor.columns:
            profile = pipeline.profile.get(column.name, {})
            cell = self.example[column.name] = column.made_up(profile)  # training records are not published
            schema = column.json_schema(profile, [cell])
            check = partial(_check_pattern, schema) if "pattern" in schema else _check_cell
            described = WithJsonSchema({"title": column.name, **schema})
            columns[column.name] = Annotated[Any, PlainValidator(check), described]
        record = TypedDict("Record", columns)
        self.lone = preprocessor.lone
        self._records = TypeAdapter(Annotated[list[record], FailFast()])
        self.record = self._records.json_schema()["$defs"]["Record"]

    def read_body(self, body) -> list[dict]:
        """Return the validated records of a JSON body. Raises UserError, naming row and column."""
        if not isinstance(body, dict) or not isinstance(body.get("records"), list):
            raise UserError('the request body must be a JSON object of the form {"records": [...]}.')
        records = body["records"]
        if not 1 <= len(records) <= MAX_RECORDS:
            raise UserError(f"records: between 1 and {MAX_RECORDS} per request, got {len(records)}.")
        return self.validate(records)

    def validate(self, records: list, first: int = 1) -> list[dict]:
        """Return records with the model's columns only; bare values are accepted for a lone column.

        first: the number of the first record. Raises UserError, naming row and column.
        """
        if self.lone:
            records = [r if isinstance(r, dict) else {self.lone.name: r} for r in records]
        try:
            return self._records.validate_python(records)
        except ValidationError as error:
            raise UserError(self._explain(error.errors(include_url=False)[0], first)) from None

    def _explain(self, problem: dict, first: int) -> str:
        (at, *column), given = problem["loc"], problem["input"]
        row = f"row {at + first}"
        if not column:
            return f"{row}: a record must be an object of columns and values, got {type(given).__name__}."
        where = f"{row}, column {column[0]!r}"
        if problem["type"] == "missing":
            others = [name for name in given if name not in self.record["properties"]]
            return f"{where} is missing.{did_you_mean(column[0], others[:1000], list(given)[:1000])}"
        return f"{where}: {problem['msg']}."

    def request_body(self) -> dict:
        """Describe the body of POST /predict for OpenAPI, with an example."""
        records, file = self.record, {"type": "string", "format": "binary"}
        if self.lone:
            records = {"anyOf": [self.record["properties"][self.lone.name], records]}
        records = {"type": "array", "minItems": 1, "maxItems": MAX_RECORDS, "items": records}
        body = {"schema": {"type": "object", "properties": {"records": records}, "required": ["records"]}}
        body["example"] = {"records": [self.example]}
        if self.lone and self.lone.path_cells:
            file = {"type": "array", "minItems": 1, "items": file, "description": "one record per file"}
        else:
            file["description"] = "records as csv, tsv, txt, jsonl, parquet, xlsx, xls or ods, also with .gz"
        form = {"schema": {"type": "object", "properties": {"file": file}, "required": ["file"]}}
        return {"required": True, "content": {"application/json": body, "multipart/form-data": form}}


# ---------------------------------------------------------------- static models


class Prediction(BaseModel):
    """The prediction for one record. Probabilities are present for classification only.

    Of a model that was trained with --coverage, also a set of classes, or the ends of an interval.
    """

    prediction: bool | float | str | None = Field(
        description="the predicted class, or the predicted number; null if the image of the record cannot be read"
    )
    probability: float = Field(None, description="probability of the predicted class")
    probabilities: dict[str, float] = Field(None, description="probability of each class")
    lower: float = Field(None, description="with --coverage: lower end of the interval around a number")
    upper: float = Field(None, description="with --coverage: upper end of the interval around a number")
    set: list[bool | float | str] = Field(None, description="with --coverage: the classes that the set holds")
    error: str = Field(None, description="why the image of the record cannot be read, by file name or row")
    record: dict[str, Any] = Field(None, description="the cells of the file's row, with ?keep=true")


class Predictions(BaseModel):
    """Predictions in the order of the records."""

    id: str = Field(description="identifies the request in POST /feedback")
    predictions: list[Prediction]
    warnings: list[str] = Field(
        None,
        description=f"cells that training did not know, by row and column; left out if there are none, and at most "
        f"{MAX_WARNINGS} of them",
    )


def first_warnings(warnings: list[str], count: int) -> list[str]:
    """Return the first of `count` warnings, and how many more there are."""
    more = count - MAX_WARNINGS
    return [*warnings[:MAX_WARNINGS], f"and {more:,} more"] if more > 0 else warnings


def _query_parameter(name: str, kind: str, description: str) -> dict:
    """Describe an optional query parameter for OpenAPI."""
    return {"name": name, "in": "query", "required": False, "schema": {"type": kind}, "description": description}


KEEP = _query_parameter(
    "keep", "boolean", "for an uploaded table: return the cells of each row as `record` of its prediction"
)
SHEET = _query_parameter("sheet", "string", "for an uploaded spreadsheet: the sheet to read; by default the first")


class Feedback(BaseModel):
    """The true targets of the records of an earlier request. They replace those that were sent before."""

    id: str = Field(description="id that POST /predict returned")
    targets: list[Cell] = Field(description="the true target of each record, in order; null = not known")

    @classmethod
    def read(cls, body) -> "Feedback":
        """Validate a JSON body. Raises UserError."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            if problem["type"] == "cell":
                raise UserError(f"row {problem['loc'][1] + 1}, targets: {problem['msg']}.") from None
            raise UserError('the request body must be a JSON object {"id": "…", "targets": [...]}.') from None


class Kept(BaseModel):
    """How many targets were stored on disk."""

    kept: int


class Reload(BaseModel):
    """How to load the checkpoint file again."""

    force: bool = Field(False, strict=True, description="use the new model even if it is worse than the present one")

    @classmethod
    def read(cls, raw: bytes) -> "Reload":
        """Validate a body, which may be empty. Raises UserError."""
        try:
            return cls.model_validate(parse_json(raw)) if raw.strip() else cls()
        except ValidationError:
            raise UserError('the request body must be empty, or {"force": true}.') from None


class Reloaded(BaseModel):
    """The model that is used from now on."""

    model: str = Field(description="sha256 of the checkpoint")
    comparison: str = Field(description="how it compares with the model before; empty if the file is the same")


class Error(BaseModel):
    """Why a request was refused, in one line."""

    detail: str


def error(description: str) -> dict:
    """Describe an error response for FastAPI."""
    return {"model": Error, "description": description}


ERRORS = {
    401: error("the API key is missing or wrong"),
    403: error("the request comes from a page of another site"),
    408: error("the body took too long to arrive"),
    413: error("the body is too large"),
    422: error("invalid input; the message names row and column"),
    503: error("the service is overloaded: retry after Retry-After seconds"),
}
