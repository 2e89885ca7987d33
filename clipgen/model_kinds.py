"""The models that runs train: the command that trains each, and its folder in a run folder."""

COMMANDS = {
    "VQGAN": "clipgen-train stage=vqgan",
    "ConditionalTransformer": "clipgen-train stage=transformer",
    "ClassConditionalTransformer": "clipgen-train stage=transformer data=cached data.conditioning=class",
}
MODEL_FOLDER_NAMES = {
    "VQGAN": "vqgan",
    "ConditionalTransformer": "transformer",
    "ClassConditionalTransformer": "label_transformer",
}
