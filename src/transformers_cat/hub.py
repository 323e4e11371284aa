"""Checkpoints for the Hub: complete with their code, in one commit."""

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard

from .cards import model_card
from .configuration_cat import CATConfig
from .feature_extraction_cat import CATFeatureExtractor
from .modeling_cat import CATForAudioClassification, CATModel, CATPreTrainedModel


def include_code(model: CATPreTrainedModel) -> None:
    """Let whatever is saved from now on carry its code, so that it loads where this package is not installed.

    A model and a feature extractor saved after this (by `save_pretrained`, a `Trainer` or `push_to_hub`) bring the five
    files of the model along, and `from_pretrained` and `pipeline` use them when `trust_remote_code=True` is passed. As
    transformers has it, this holds for the classes, until the process ends. Where the package is imported, it is used.

    Args:
        model: Its configuration also names the class that `AutoModel` loads, besides that of the model itself.

    Raises:
        TypeError: The model is none of this package.
    """
    if not isinstance(model, CATPreTrainedModel):
        raise TypeError(f"Only the code of a CAT model can be included, not that of a {type(model).__name__}.")
    CATConfig.register_for_auto_class()
    CATFeatureExtractor.register_for_auto_class()
    CATModel.register_for_auto_class("AutoModel")
    CATForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
    # Saving adds the model's own class; without this entry a classifier's checkpoint would have no body to load.
    auto_map = getattr(model.config, "auto_map", None) or {}
    model.config.auto_map = {**auto_map, "AutoModel": f"{CATModel.__module__.split('.')[-1]}.{CATModel.__name__}"}


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
    include_code(model)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if card is None and not api.file_exists(repo_id, "README.md", revision=revision):
        card = model_card(model, name=repo_id)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        if card is not None:
            card.save(Path(folder) / "README.md")
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
