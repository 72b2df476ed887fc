"""What config.json says about a model that the stock config cannot express."""

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "hf_compress"
VERSION = 1
REQUIRES = "pip install hf_compress, and `import hf_compress` before from_pretrained"
FFN_WIDTH = "ffn"


class CompressionConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint.

    Args:
        widths (`dict[str, dict[str, int]]`, *optional*): By block (`"encoder.0"`: stack and index), what is left of
            it: the key-value groups of its attentions (`"self"`, `"cross"`; equal to the heads without grouped-query
            attention) and the neurons of its feed-forward network (`"ffn"`). 0 stands for a part that was removed.
            Without it, the model has the widths of the stock config.
        sparse (`list[str]`, *optional*): Names of weights that may be stored without their zeros: as the other
            elements, under the name of the weight, and a bitmask, under the name and `_bitmask`. See `pack_sparse`.
        formats (`list[dict[str, Any]]`, *optional*): Modules whose weights are in a number format: each entry has
            `"format"`, the names of the `"modules"`, and the fields of the format.
        inner (`dict[str, Any]`, *optional*): The `quantization_config` of another library, whose quantizer takes over
            once the skeleton has its widths.
        version (`int`, *optional*, defaults to `1`): Version of this format.
        **unknown: Refused by name, so that nothing is half-read.

    Raises:
        ValueError: if the version is newer than this library's, a field is unknown or not of its type, or nothing is
            said at all.
    """

    quant_method = METHOD

    def __init__(
        self,
        widths: dict[str, dict[str, int]] | None = None,
        sparse: list[str] | None = None,
        formats: list[dict[str, Any]] | None = None,
        inner: dict[str, Any] | None = None,
        version: int = VERSION,
        **unknown: Any,
    ) -> None:
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(
                f"The checkpoint is in version {version!r} of the hf_compress format, but this library reads versions "
                f"1 to {VERSION}: type `pip install --upgrade hf_compress`."
            )
        surplus = sorted(unknown.keys() - {"quant_method", "requires"})
        if surplus:
            raise ValueError(
                f"quantization_config has fields that hf_compress does not know: {', '.join(surplus)}. The checkpoint "
                "was changed by hand or by another tool: restore the config.json that it was saved with."
            )
        if widths is not None or (sparse is None and formats is None and inner is None):
            _check_widths(widths)
        if sparse is not None:
            _check_sparse(sparse)
        if formats is not None:
            _check_formats(formats)
        if inner is not None:
            _check_inner(inner)
        self.widths = widths
        self.sparse = sparse
        self.formats = formats
        self.inner = inner
        self.version = version
        self.requires = REQUIRES

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types.

        Returns:
            `dict[str, Any]`: What is written to config.json.
        """
        fields = {
            "formats": self.formats,
            "inner": self.inner,
            "quant_method": METHOD,
            "requires": self.requires,
            "sparse": self.sparse,
            "version": self.version,
            "widths": self.widths,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def is_packed(self) -> bool:
        """Whether a loaded model computes with packed weights: it cannot be cut or trained as it is."""
        return self.formats is not None or self.inner is not None

    def get(self, name: str, default: Any = None) -> Any:
        """One field: `from_pretrained` reads the config of a live model, given as `config=`, as if it were JSON.

        Args:
            name (`str`): A field.
            default (`Any`, *optional*): What to return where there is none.

        Returns:
            `Any`: As in config.json.
        """
        return self.to_dict().get(name, default)


def _check_widths(widths: Any) -> None:
    def is_width(name: Any, width: Any) -> bool:
        return isinstance(name, str) and type(width) is int and width >= 0

    sound = isinstance(widths, dict) and all(
        isinstance(block, str) and isinstance(parts, dict) and all(is_width(*item) for item in parts.items())
        for block, parts in widths.items()
    )
    if not sound:
        raise ValueError(
            f"widths={widths!r} in quantization_config must map each block to the widths of its parts, from 0, as in "
            '{"encoder.0": {"self": 4, "ffn": 512}}: restore the config.json that the checkpoint was saved with.'
        )


def _check_sparse(sparse: Any) -> None:
    is_list = isinstance(sparse, list) and all(isinstance(name, str) for name in sparse)
    if not is_list or len(set(sparse)) < len(sparse):
        raise ValueError(
            f"sparse={sparse!r} in quantization_config must be a list of distinct names of weights, as in "
            '["classifier.weight"]: restore the config.json that the checkpoint was saved with.'
        )


def _check_formats(formats: Any) -> None:
    def is_entry(entry: Any) -> bool:
        return isinstance(entry, dict) and isinstance(entry.get("format"), str) and _are_names(entry.get("modules"))

    sound = isinstance(formats, list) and formats and all(map(is_entry, formats))
    names = [name for entry in formats for name in entry["modules"]] if sound else []
    if not sound or len(set(names)) < len(names):
        raise ValueError(
            f"formats={formats!r} in quantization_config must be a list of number formats, each with the names of its "
            'modules, of which none has two, as in [{"format": "int8", "modules": ["linear"]}]: restore the '
            "config.json that the checkpoint was saved with."
        )


def _check_inner(inner: Any) -> None:
    if (
        not isinstance(inner, dict)
        or not isinstance(inner.get("quant_method"), str)
        or inner["quant_method"] == METHOD
    ):
        raise ValueError(
            f"inner={inner!r} in quantization_config must be the config of another library, with its quant_method: "
            "restore the config.json that the checkpoint was saved with."
        )


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
