"""Edit facts of Hugging Face language models in sequence, with SPHERE."""

try:
    from sphere_edit.config import EditConfig
    from sphere_edit.data import load_requests
    from sphere_edit.data.records import BatchRecord, EditResult
    from sphere_edit.data.requests import EditRequest
    from sphere_edit.editing.editor import SphereEditor
    from sphere_edit.evaluation.answers import evaluate_answers, write_answers
    from sphere_edit.evaluation.metrics import evaluate, perplexity
    from sphere_edit.evaluation.texts import fit_tfidf, generate_texts, read_references, reference_texts, score_texts
    from sphere_edit.model.loading import load_model
    from sphere_edit.model.structure import find_structure
    from sphere_edit.targets.presets import PRESETS, preset
    from sphere_kernels import __version__
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sphere_edit needs the package {error.name}; pip install 'sphere-kernels[edit]', or [demo] for the demo's data"
    ) from error

__all__ = [
    "PRESETS",
    "BatchRecord",
    "EditConfig",
    "EditRequest",
    "EditResult",
    "SphereEditor",
    "__version__",
    "evaluate",
    "evaluate_answers",
    "find_structure",
    "fit_tfidf",
    "generate_texts",
    "load_model",
    "load_requests",
    "perplexity",
    "preset",
    "read_references",
    "reference_texts",
    "score_texts",
    "write_answers",
]
