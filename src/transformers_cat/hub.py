"""Checkpoints for the Hub: complete with their code, in one commit."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard

from .cards import model_card
from .configuration_cat import CATConfig
from .feature_extraction_cat import CATFeatureExtractor
from .modeling_cat import CATForAudioClassification, CATModel, CATPreTrainedModel

AUTO_CLASSES = {
    CATConfig: "AutoConfig",
    CATFeatureExtractor: "AutoFeatureExtractor",
    CATModel: "AutoModel",
    CATForAudioClassification: "AutoModelForAudioClassification",
}


@contextmanager
def include_code(model: CATPreTrainedModel, feature_extractor: CATFeatureExtractor) -> Iterator[None]:
    """Let what is saved inside of `with` carry its code, so that it loads where this package is not installed.

    The folder or repository gets the files of the model, and its configurations name their classes: `from_pretrained`
    and `pipeline` use them when `trust_remote_code=True` is passed. Where the package is imported, it is used instead.
    With any Trainer: `with include_code(model, feature_extractor): trainer.push_to_hub()`.

    Args:
        model: What is saved with its code.
        feature_extractor: Saved with it.

    Raises:
        TypeError: The model's class is none of this package, be it derived from one.
    """
    own = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))  # FSDP derives a class
    if own not in AUTO_CLASSES:
        if own.__module__.startswith("transformers_modules."):
            raise TypeError(
                f"This {type(model).__name__} was loaded by `trust_remote_code`, and is saved with its code as it is: "
                "call `save_pretrained`, or load the model with the package imported."
            )
        raise TypeError(
            f"Only the code of CATModel and CATForAudioClassification can be included, not that of a "
            f"{type(model).__name__}: save it with `register_for_auto_class` and its own files instead."
        )
    registered = {cls: cls._auto_class for cls in AUTO_CLASSES}
    auto_maps = [(owner, vars(owner).get("auto_map")) for owner in (model.config, feature_extractor)]
    try:
        for cls, auto_class in AUTO_CLASSES.items():
            cls.register_for_auto_class(auto_class)
        # Saving enters the model's own class; a classifier's checkpoint has a body to load as well.
        body = f"{CATModel.__module__.rpartition('.')[2]}.{CATModel.__name__}"
        model.config.auto_map = {**(auto_maps[0][1] or {}), "AutoModel": body}
        yield
    finally:
        # The classes hold this for the whole process: what is saved later must not name files that it does not have.
        for cls, auto_class in registered.items():
            cls._auto_class = auto_class
        for owner, auto_map in auto_maps:
            owner.auto_map = auto_map
            if auto_map is None:
                del owner.auto_map


def push_to_hub(
    model: CATForAudioClassification,
    feature_extractor: CATFeatureExtractor,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Upload all that `pipeline` needs in one commit: weights (safetensors), both configurations, code and card.

    The repository and the branch are made if they do not exist. Files that the repository has besides are left alone.

    Args:
        model: Uploaded as it is; `model.drop_reconstruction()` first leaves out what only training uses.
        feature_extractor: The one that the model was trained with.
        repo_id: "name" or "organisation/name".
        card: The README.md. By default that of the repository is kept; if there is none, a card without results is
            written.
        private: Whether a new repository is private; by default as the organisation has it, else public.
        token: A token with write permission; by default the one of `hf auth login` or of `HF_TOKEN`.
        revision: The branch; "main" by default.
        commit_message: First line of the commit.

    Returns:
        The commit, with its URL and its hash.

    Raises:
        TypeError: The model is none of this package.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses: no valid token, no permission.
    """
    with include_code(model, feature_extractor), tempfile.TemporaryDirectory() as folder:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if card is None and not api.file_exists(repo_id, "README.md", revision=revision):
            card = model_card(model, name=repo_id)
        model.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        if card is not None:
            card.save(Path(folder) / "README.md")
        return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
