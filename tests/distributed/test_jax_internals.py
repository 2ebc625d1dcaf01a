"""The private names of JAX that the package uses exist; a failure says which one has moved."""

import importlib
import importlib.resources
import inspect

import jax
import pytest

from pspo_jax.distributed import jax_internals

MOVED = f"has moved in JAX {jax.__version__}: adapt pspo_jax/distributed/jax_internals.py"


@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("jax._src.clusters", "ClusterEnv._cluster_types"),
        ("jax._src.clusters", "ClusterEnv.opt_in_only_method"),
        ("jax._src.clusters", "ClusterEnv.is_env_present"),
        ("jax._src.clusters", "ClusterEnv.get_process_count"),
        ("jax._src.distributed", "global_state.client"),
        ("jax._src.cudnn.fused_attention_stablehlo", "MaskType.PADDING"),
        ("jax._src.cudnn.fused_attention_stablehlo", "dot_product_attention"),
        ("jax._src.lib", "_jax.DistributedRuntimeClient.wait_at_barrier"),
        ("jax._src.lib", "_jax.DistributedRuntimeClient.key_value_set"),
        ("jax._src.lib", "_jax.DistributedRuntimeClient.key_value_dir_get"),
        ("jax._src.lib", "_jax.DistributedRuntimeClient.blocking_key_value_get"),
    ],
)
def test_every_private_name_of_jax_is_where_it_was(module, path):
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        pytest.fail(f"{module} {MOVED}")
    for name in path.split("."):
        assert hasattr(found, name), f"{module}.{path} {MOVED}"
        found = getattr(found, name)


def test_a_single_machine_is_not_a_cluster_and_has_no_coordination_service(monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "JOBSET_NAME", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    assert jax_internals.cluster_processes() == 1
    with pytest.raises(ValueError, match="initialize"):
        jax_internals.coordination_client()


def test_cudnn_attention_has_the_arguments_that_are_given():
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    given = {"q_seqlen", "kv_seqlen", "scale", "mask_type", "qkv_layout", "return_residual"}
    assert given <= set(inspect.signature(dot_product_attention).parameters), f"dot_product_attention {MOVED}"


def test_only_one_file_names_private_modules():
    import pspo_jax

    package = importlib.resources.files(pspo_jax)
    named = [path for path in package.rglob("*.py") if "jax._src" in path.read_text(encoding="utf-8")]
    assert [path.name for path in named] == ["jax_internals.py"]
    assert inspect.getdoc(jax_internals)
