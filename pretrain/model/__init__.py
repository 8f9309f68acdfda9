"""The one transformer that every objective trains, on megatron-core's tensor-parallel layers."""
