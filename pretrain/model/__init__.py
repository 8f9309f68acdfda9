"""The one transformer that every objective trains, on megatron-core's tensor-parallel layers."""

from parallel.imports import quiet

quiet()  # megatron-core warns about optional kernels while it is imported
