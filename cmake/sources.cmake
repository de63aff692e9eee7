# Every op once: room/op. Its files are csrc/<room>/<op>{.h,.cuh,.cu,_cpu.cpp,_op.cpp}.
# This list is all that CMake has to know about an op, for each of the three builds.
# -DLIGHTVLM_OPS="room/op;..." builds some of them only.
if(NOT LIGHTVLM_OPS)
    set(LIGHTVLM_OPS
        compaction/compact_kv
        compaction/compact_paged_kv
        decode_attention/append_attend
        decode_attention/decode_attention
        importance/importance
        merging/gather_tokens
        merging/merge_pairs
        merging/merge_tokens
        quantization/dequantize_kv
        quantization/quantize_kv
        selection/select
        selection/select_diverse
    )
endif()
