{
  description = "Fused Triton decoder losses for TopK and HierarchicalTopK sparse autoencoders";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
