"""The HTTP routes: predictions, feedback, reload, health, schema, drift, metrics and the page."""

import asyncio
import contextlib
import signal
import sqlite3
import sys
import time
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile

from errors import BrokenRecords, UserError
from pipeline import FORMAT
from preprocessing.cleaning import replace_surrogates
from serving import schema, uploads
from serving.batching import MAX_PIXELS, Model, Service
from serving.guard import MAX_BODY, Guard


def make_app(service: Service, key: str = "", hosts: tuple[str, ...] = ()) -> FastAPI:
    """Return the application around a Service.

    key: the API key that all routes but /health require.  hosts: names that requests may address; empty = any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_):
        loop, worker = asyncio.get_running_loop(), asyncio.create_task(service.run())
        with contextlib.suppress(ValueError, RuntimeError, AttributeError):  # not the main thread, or Windows
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(_reload_on_signal(service)))
        yield
        worker.cancel()

    title = f"Predict {service.model.pipeline.task.target}"
    app = FastAPI(title=title, lifespan=lifespan, docs_url=None, redoc_url=None)  # their scripts come from elsewhere
    _handle_errors(app)
    _add_predict(app, service)
    _add_feedback(app, service)
    _add_reload(app, service)
    _add_reports(app, service)
    paths = {route.path for route in app.routes}
    app.add_middleware(Guard, metrics=service.metrics, key=key, paths=paths, hosts=hosts)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(sqlite3.Error)
    async def log_error(_, error):
        detail = f"the log cannot be written ({error}): try again in a second."
        return JSONResponse({"detail": detail}, 503, {"Retry-After": "1"})

    @app.exception_handler(UserError)
    async def user_error(_, error):
        return JSONResponse({"detail": replace_surrogates(str(error))}, 422)


def _add_predict(app: FastAPI, service: Service) -> None:
    @app.post("/predict", response_model=schema.Predictions, responses=schema.ERRORS)
    async def predict(request: Request):
        """Predict records, sent as JSON or as files in a multipart form."""
        model = service.model  # one model for the whole request, even if another is loaded meanwhile
        if not request.headers.get("content-type", "").startswith("multipart/"):
            records = model.schema.read_body(schema.parse_json(await request.body()))
        else:
            files = await uploads.read_files(request)
            if not all(uploads.is_cell(file, model) for file in files):
                if len(files) > 1:
                    raise UserError(f"send one file of records per request, got {len(files)} files.")
                text = await uploads.predict_table(request, *files, service, model)
                return Response(text, media_type="application/json")
            return await predict_files(files, model)
        return answer(*await service.predict(records, model))

    async def predict_files(files: list[UploadFile], model: Model) -> JSONResponse:
        """Predict files that are a record each. Messages name the file."""
        names = [replace_surrogates(file.filename or "") for file in files]
        records = [{model.schema.lone.name: await file.read()} for file in files]
        try:
            request_id, predictions, warnings = await service.predict(records, model)
        except BrokenRecords as error:
            position, message = next(iter(error.messages.items()))
            raise UserError(f"{names[position]}: {message}") from None
        for name, prediction in zip(names, predictions, strict=True):
            if "error" in prediction:
                prediction["error"] = f"{name}: {prediction['error']}"
        return answer(request_id, predictions, warnings)

    def answer(request_id: str, predictions: list[dict], warnings: list[str]) -> JSONResponse:
        shown = schema.first_warnings(warnings, len(warnings))
        return JSONResponse({"id": request_id, "predictions": predictions} | ({"warnings": shown} if shown else {}))

    route = app.routes[-1]

    def openapi() -> dict:
        """Describe the current model, which a reload may have changed."""
        route.openapi_extra = {
            "requestBody": service.model.schema.request_body(),
            "parameters": [schema.KEEP, schema.SHEET],
        }
        app.openapi_schema = None
        return FastAPI.openapi(app)

    app.openapi = openapi


def _add_feedback(app: FastAPI, service: Service) -> None:
    body = {"required": True, "content": {"application/json": {"schema": schema.Feedback.model_json_schema()}}}
    unknown, not_logged = schema.error("unknown request id"), schema.error("the service was started without --log")
    refused = schema.ERRORS | {404: unknown, 409: not_logged}

    @app.post("/feedback", response_model=schema.Kept, responses=refused, openapi_extra={"requestBody": body})
    async def feedback(request: Request):
        """Store the true targets of a request's records. They are on disk when this returns."""
        if not service.log:
            raise HTTPException(409, "requests are not logged: start the service with --log requests.db.")
        sent = schema.Feedback.read(schema.parse_json(await request.body()))
        await asyncio.to_thread(keep, sent.id, sent.targets)
        return JSONResponse({"kept": sum(target is not None for target in sent.targets)})

    def keep(request_id: str, targets: list) -> None:
        predictions = service.log.predictions(request_id)
        if not predictions:
            raise HTTPException(404, "no predictions are logged under this id.")
        if len(targets) != len(predictions):
            raise UserError(f"targets: expected {len(predictions)}, one per record of the request, got {len(targets)}.")
        if all(target is None for target in targets):
            raise UserError("targets: give at least one that is not null.")
        task = service.model.pipeline.task
        try:  # the prediction stands in for a target that is not known, so that errors name the right row
            # An image that could not be read was not predicted, and has no error.
            targets = [None if "error" in p else target for p, target in zip(predictions, targets, strict=True)]
            guess = next(p for p in predictions if "error" not in p)
            predictions = [guess if "error" in p else p for p in predictions]
            given = [p["prediction"] if t is None else t for p, t in zip(predictions, targets, strict=True)]
            errors = task.errors(predictions, given)
            errors = [None if t is None else error for t, error in zip(targets, errors, strict=True)]
        except (LookupError, TypeError, AttributeError, StopIteration):
            raise sqlite3.DatabaseError("the predictions under this id are damaged") from None
        service.log.add_targets(request_id, task.target, targets, errors)


def _add_reload(app: FastAPI, service: Service) -> None:
    refused = schema.ERRORS | {409: schema.error("the old model is kept")}
    body = {"content": {"application/json": {"schema": schema.Reload.model_json_schema()}}}

    @app.post("/reload", response_model=schema.Reloaded, responses=refused, openapi_extra={"requestBody": body})
    async def reload(request: Request):
        """Load the checkpoint file again. The old model is kept if the self-check rows of the new one are not
        reproduced, or if it is worse."""
        sent = schema.Reload.read(await request.body())
        try:
            model, comparison = await service.reload(force=sent.force)
            return JSONResponse({"model": model, "comparison": comparison})
        except UserError as error:
            raise HTTPException(409, replace_surrogates(f"the old model is kept: {error}")) from None


def _add_reports(app: FastAPI, service: Service) -> None:
    started = time.time()

    @app.get("/health")
    async def health(request: Request):
        """Return the status, the model, and its score on the targets that were sent to /feedback; without the API key,
        if there is one, the status alone."""
        if not request.scope["authorized"]:
            return {"status": "ready"}
        task = service.model.pipeline.task
        state = {
            "status": "ready",
            "model": service.model.sha256,
            "target": task.target,
            "task": task.kind,
            "version": f"checkpoint format {FORMAT}",
            "seconds": round(time.time() - started, 3),
            "waiting": service.waiting,
        }
        if service.log:
            state["live"] = task.live_score(*service.log.live_errors(service.model.sha256))
        return state

    @app.get("/schema")
    async def describe():
        """Return the schema of a record, a made-up example, the classes and the limits."""
        model = service.model
        task, records = model.pipeline.task, model.schema
        limits = {"bytes": MAX_BODY, "records": schema.MAX_RECORDS, "characters": schema.MAX_TEXT, "pixels": MAX_PIXELS}
        return {
            "task": task.kind,
            "target": task.target,
            "classes": task.classes,
            "coverage": task.coverage,
            "record": records.record,
            "lone": records.lone.name if records.lone else None,
            "example": records.example,
            "limits": limits,
            "feedback": service.log is not None,
        }

    @app.get("/drift")
    async def drift():
        """Compare the newest records with the training data, column by column."""
        return await asyncio.to_thread(service.drift)

    @app.get("/metrics", response_class=Response)
    async def metrics():
        """Return the metrics in the Prometheus text format."""
        service.metrics.waiting.set(service.waiting)
        await asyncio.to_thread(service.drift)
        service.score_live()
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def page():
        """Return a web page on which to try the model."""
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


async def _reload_on_signal(service: Service) -> None:
    """Reload on SIGHUP and report the result on standard error."""
    try:
        model, comparison = await service.reload()
        print(f"reloaded {service.checkpoint}: {model}; {comparison}".removesuffix("; "), file=sys.stderr)
    except UserError as error:
        print(f"not reloaded, the old model is kept: {error}", file=sys.stderr)
