// Every op's schema, one line each, and what the library says about itself. Implementations
// register in their own <op>_op.cpp. The same lines define the emulated twins.
#include <torch/csrc/stable/library.h>

#include "common/error_word.h"

#if defined(LIGHTVLM_EMULATION)
STABLE_TORCH_LIBRARY(lightvlm_emulated, m) {
#else
STABLE_TORCH_LIBRARY(lightvlm, m) {
#endif
    // Outputs are the caller's: kernels never allocate. error is the device error word.
    m.def(
        "select(Tensor scores, Tensor? forced, Tensor? candidates, Tensor? segment, Tensor? keep, "
        "int keep_each, float mass, Tensor(a!) index, Tensor(b!) count, Tensor(c!) inverse, "
        "Tensor(d!)? error) -> ()");
    m.def(
        "select_diverse(Tensor scores, Tensor features, Tensor? forced, Tensor? candidates, "
        "Tensor? segment, Tensor? keep, int keep_each, float strength, Tensor(a!)? workspace, "
        "Tensor(b!) index, Tensor(c!) count, Tensor(d!) inverse, Tensor(e!)? error) -> ()");
    m.def(
        "importance(Tensor query, Tensor key, Tensor? lse, float scale, bool causal, "
        "Tensor? row_pos, Tensor? lens, Tensor? leftpad, str rows, str heads, str axis, "
        "Tensor(a!) score, Tensor(b!) visible, Tensor(c!)? workspace, Tensor(d!)? error) -> ()");
    m.def(
        "gather_tokens(Tensor[] x, Tensor index, Tensor count, bool right, Tensor(a!)[] out, "
        "Tensor(b!)? error) -> ()");
    m.def(
        "compact_kv(Tensor(a!)[] caches, int[] layer, int[] token_dim, Tensor[] index, "
        "Tensor[] count, Tensor(b!)? error) -> ()");
    m.def(
        "compact_paged_kv(Tensor(a!)[] pages, int[] by, Tensor[] index, Tensor[] count, int[] of, "
        "Tensor[] block_table, Tensor?[] lens, Tensor?[] refcount, Tensor(b!)[] row_pages, "
        "Tensor(c!)[] freed, Tensor(d!)[] freed_count, Tensor(e!)? error) -> ()");
    m.def(
        "merge_tokens(Tensor x, Tensor metric, Tensor index, Tensor count, Tensor weight, "
        "Tensor group, bool right, Tensor(a!) out, Tensor(b!)? target, Tensor(c!)? workspace, "
        "Tensor(d!)? error) -> ()");
    m.def(
        "merge_pairs(Tensor x, Tensor metric, Tensor window, Tensor? source, Tensor? protected, "
        "Tensor? weight, Tensor? each, int merge, float ratio, float eps, bool right, "
        "Tensor(a!) out, Tensor(b!) index, Tensor(c!) count, Tensor(d!) inverse, "
        "Tensor(e!) target, Tensor(f!) out_weight, Tensor(g!)? workspace, Tensor(h!)? error) -> "
        "()");
    m.def(
        "decode_attention(Tensor query, Tensor[] key, Tensor[] value, int[] bits, int[] block, "
        "Tensor?[] lens, Tensor?[] leftpad, Tensor?[] block_table, Tensor?[] key_scale, "
        "Tensor?[] key_zero, Tensor?[] value_channel, Tensor?[] value_token, float scale, "
        "Tensor(a!)[] mass, "
        "int[] mass_segment, Tensor(b!) out, Tensor(c!) lse, Tensor(d!)? workspace, "
        "Tensor(e!)? ticket, Tensor(f!)? error) -> ()");
    m.def(
        "append_attend(Tensor query, Tensor(a!) key, Tensor(b!) value, Tensor? new_key, "
        "Tensor? new_value, Tensor? lens, Tensor? leftpad, Tensor? block_table, float scale, "
        "Tensor(c!) out, Tensor(d!) lse, Tensor(e!)? mass, Tensor(f!)? workspace, "
        "Tensor(g!)? ticket, Tensor(h!)? error) -> ()");
    m.def(
        "quantize_kv(Tensor key, Tensor value, Tensor? lens, int bits, int block, "
        "Tensor(a!) key_codes, Tensor(b!) value_codes, Tensor(c!) key_scale, Tensor(d!) key_zero, "
        "Tensor(e!) value_channel, Tensor(f!) value_token, Tensor(g!)? workspace, "
        "Tensor(h!)? error) -> ()");
    m.def(
        "dequantize_kv(Tensor key_codes, Tensor value_codes, Tensor key_scale, Tensor key_zero, "
        "Tensor value_channel, Tensor value_token, Tensor? lens, int bits, int block, "
        "Tensor(a!) key, Tensor(b!) value, Tensor(c!)? error) -> ()");
}

#if !defined(LIGHTVLM_EMULATION)
#include "build_config.h"

// JSON: version, compilers, arches, the torch it was built with. Read by lightvlm_ext.build_info().
extern "C" __attribute__((visibility("default"))) const char* lightvlm_build_info() {
    return LIGHTVLM_BUILD_INFO;
}

// What a bit of the device error word means; null beyond the last bit.
extern "C" __attribute__((visibility("default"))) const char* lightvlm_describe_error(int32_t bit) {
    return bit >= 1 && bit <= lightvlm::kErrorLast ? lightvlm::describe_error(bit) : nullptr;
}
#endif
