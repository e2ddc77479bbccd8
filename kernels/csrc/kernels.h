/* All CPU kernels for one instruction set. The including file defines LANES and TABLE. */
#include "cpu.h"
#include "vector.h"

#include "../bi_wkv/csrc/bi_wkv_cpu.h"
#include "../shift_mix/csrc/shift_mix_cpu.h"
#include "../gate/csrc/gate_cpu.h"
#include "../wkv6/csrc/wkv6_cpu.h"

const kernels TABLE = {
    .lanes = LANES,
    .state_size = sizeof(segment_state),
    .grads_size = sizeof(both_sides),
    .bi_wkv_summaries = bi_wkv_summaries,
    .bi_wkv_carry = bi_wkv_carry,
    .bi_wkv_outputs = bi_wkv_outputs,
    .bi_wkv_grad_summaries = bi_wkv_grad_summaries,
    .bi_wkv_grad_carry = bi_wkv_grad_carry,
    .bi_wkv_grads = bi_wkv_grads,
    .shift_mix = shift_mix,
    .shift_mix_grads = shift_mix_grads,
    .gate = gate,
    .gate_grads = gate_grads,
    .wkv6_scratch = wkv6_scratch,
    .wkv6 = wkv6,
};
