// attention_cudnn.h: causal attention by cuDNN in place of train_gpt_mhc.cu's kernels, where it is built with
// USE_CUDNN=1. Letters and shapes as there. It serves bf16 and heads of a multiple of 8 channels, at most
// 128, for the shapes that have a plan, which are training's; everything else stays with the trainer's
// kernels: out and lse mean the same to both. The backward pass is the deterministic one: on Hopper its
// workspace grows with B * NH * T * T.
//
// cuDNN is called through cudnn-frontend, C++ headers that cost a host compiler half a minute and nvcc
// minutes. So they are compiled apart: included, this file declares; with CUDNN_IMPLEMENTATION, by itself, it
// defines.

#include <cuda_runtime.h>

// Makes the plans for a shape, where there is a GPU; with training also for the way back. Returns the bytes
// of workspace that they want, each its own: passes there and back may run side by side.
size_t cudnn_attention_plan(int B, int T, int C, int NH, bool training);
// What plans work in from now on, those that want no more than that
void cudnn_attention_workspace(void* memory, size_t bytes);

// out (B, T, C), lse (B, NH, T) from qkv (B, T, 3C). False if there is no such plan; then nothing is done.
bool cudnn_attention_forward(void* out, float* lse, const void* qkv, int B, int T, int C, int NH,
                             cudaStream_t stream);
// dqkv (B, T, 3C) from dout (B, T, C) and what the forward pass read and wrote. False likewise.
bool cudnn_attention_backward(void* dqkv, const void* dout, const void* out, const float* lse,
                              const void* qkv, int B, int T, int C, int NH, cudaStream_t stream);

#ifdef CUDNN_IMPLEMENTATION

#include <cudnn_frontend.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace fe = cudnn_frontend;
typedef fe::graph::Graph Graph;
typedef fe::graph::Tensor_attributes Tensor;
typedef std::unordered_map<int64_t, void*> Pointers;            // by Id

enum Id : int64_t { Q = 1, K, V, OUT, LSE, DOUT, DQ, DK, DV };

struct Shape { int B, T, C, NH; };
struct Plan { Shape shape; std::unique_ptr<Graph> forward, backward; };

static cudnnHandle_t handle;
static std::vector<Plan> plans;
static void* workspace;
static size_t workspace_bytes;

static void check(fe::error_t error, const Shape& s, const char* what) {
    if (error.is_good()) return;
    fprintf(stderr,
            "cuDNN: found no %s of attention with B %d, T %d, %d heads of %d (%s), expected one, build "
            "without USE_CUDNN\n",
            what, s.B, s.T, s.NH, s.C / s.NH, error.get_message().c_str());
    exit(2);
}
static void check(cudnnStatus_t status, const char* call) {
    if (status == CUDNN_STATUS_SUCCESS) return;
    fprintf(stderr, "cuDNN: %s: %s\n", call, cudnnGetErrorString(status));
    exit(EXIT_FAILURE);
}

static Plan* find_plan(const Shape& s) {
    for (Plan& p : plans)
        if (p.shape.B == s.B && p.shape.T == s.T && p.shape.C == s.C && p.shape.NH == s.NH) return &p;
    return nullptr;
}

// ------------------------------------------------------------------------------------------------
// Graphs: what is computed, and where a tensor's numbers lie. dims are B, NH, T, D

// Heads of a tensor whose tokens have `width` channels
static Tensor heads(const Shape& s, Id id, int64_t width) {
    int64_t D = s.C / s.NH;
    return Tensor().set_uid(id).set_dim({s.B, s.NH, s.T, D}).set_stride({s.T * width, D, width, 1});
}
static Tensor statistics(const Shape& s) {
    return Tensor().set_uid(LSE).set_data_type(fe::DataType_t::FLOAT).set_dim({s.B, s.NH, s.T, 1})
        .set_stride({(int64_t)s.NH * s.T, s.T, 1, 1});
}
static void write_to(Tensor* result, const Tensor& place) {
    result->set_output(true).set_uid(place.get_uid()).set_dim(place.get_dim()).set_stride(place.get_stride());
}

static std::unique_ptr<Graph> new_graph() {
    auto g = std::make_unique<Graph>();
    g->set_io_data_type(fe::DataType_t::BFLOAT16).set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    return g;
}
static float score_scale(const Shape& s) { return 1 / sqrtf((float)(s.C / s.NH)); }

static std::unique_ptr<Graph> forward_graph(const Shape& s) {
    auto g = new_graph();
    auto q = g->tensor(heads(s, Q, 3 * s.C)), k = g->tensor(heads(s, K, 3 * s.C));
    auto v = g->tensor(heads(s, V, 3 * s.C));
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true)
        .set_causal_mask(true).set_attn_scale(score_scale(s));
    auto [out, lse] = g->sdpa(q, k, v, options);
    write_to(out.get(), heads(s, OUT, s.C));
    write_to(lse.get(), statistics(s));
    lse->set_data_type(fe::DataType_t::FLOAT);
    return g;
}

static std::unique_ptr<Graph> backward_graph(const Shape& s) {
    auto g = new_graph();
    auto q = g->tensor(heads(s, Q, 3 * s.C)), k = g->tensor(heads(s, K, 3 * s.C));
    auto v = g->tensor(heads(s, V, 3 * s.C)), out = g->tensor(heads(s, OUT, s.C));
    auto dout = g->tensor(heads(s, DOUT, s.C)), lse = g->tensor(statistics(s));
    auto options = fe::graph::SDPA_backward_attributes().set_name("attention, back").set_causal_mask(true)
        .set_attn_scale(score_scale(s)).set_deterministic_algorithm(true);
    auto [dq, dk, dv] = g->sdpa_backward(q, k, v, out, dout, lse, options);
    write_to(dq.get(), heads(s, DQ, 3 * s.C));
    write_to(dk.get(), heads(s, DK, 3 * s.C));
    write_to(dv.get(), heads(s, DV, 3 * s.C));
    return g;
}

// ------------------------------------------------------------------------------------------------

static bool serves(const Shape& s) {
    int devices = 0, D = s.C / s.NH;
    return D % 8 == 0 && D <= 128 && cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

// Bytes of workspace, aligned
static size_t room(const Graph* g) { return g ? ((size_t)g->get_workspace_size() + 255) / 256 * 256 : 0; }

static void build(Plan* p, std::unique_ptr<Graph>* place, std::unique_ptr<Graph> g, const char* what) {
    check(g->build(handle, {fe::HeurMode_t::A}), p->shape, what);
    *place = std::move(g);
}

size_t cudnn_attention_plan(int B, int T, int C, int NH, bool training) {
    Shape s = {B, T, C, NH};
    if (!serves(s)) return 0;
    if (!handle) check(cudnnCreate(&handle), "cudnnCreate");
    Plan* p = find_plan(s);
    if (!p) p = &plans.emplace_back(Plan{s, nullptr, nullptr});
    if (!p->forward) build(p, &p->forward, forward_graph(s), "plan");
    if (training && !p->backward) build(p, &p->backward, backward_graph(s), "deterministic backward plan");
    return room(p->forward.get()) + room(p->backward.get());
}

void cudnn_attention_workspace(void* memory, size_t bytes) { workspace = memory, workspace_bytes = bytes; }

static bool aligned(const Pointers& pointers) {
    for (auto& p : pointers)
        if ((uintptr_t)p.second % 16) return false;
    return true;
}
static bool execute(const Plan& p, const Graph* graph, Pointers& pointers, cudaStream_t stream) {
    size_t first = graph == p.backward.get() ? room(p.forward.get()) : 0;
    if (!graph || first + room(graph) > workspace_bytes || !aligned(pointers)) return false;
    check(cudnnSetStream(handle, stream), "cudnnSetStream");
    check(graph->execute(handle, pointers, (char*)workspace + first), p.shape, "way to run its plan");
    return true;
}
// q, k or v, or its gradient, within a tensor (B, T, 3C) of bf16
static void* third(const void* qkv, int C, int which) { return (uint16_t*)qkv + (size_t)which * C; }

bool cudnn_attention_forward(void* out, float* lse, const void* qkv, int B, int T, int C, int NH,
                             cudaStream_t stream) {
    Plan* p = find_plan({B, T, C, NH});
    Pointers pointers = {{Q, third(qkv, C, 0)}, {K, third(qkv, C, 1)}, {V, third(qkv, C, 2)}, {OUT, out},
                         {LSE, lse}};
    return p && execute(*p, p->forward.get(), pointers, stream);
}

bool cudnn_attention_backward(void* dqkv, const void* dout, const void* out, const float* lse,
                              const void* qkv, int B, int T, int C, int NH, cudaStream_t stream) {
    Plan* p = find_plan({B, T, C, NH});
    Pointers pointers = {{Q, third(qkv, C, 0)},   {K, third(qkv, C, 1)},   {V, third(qkv, C, 2)},
                         {OUT, (void*)out},       {DOUT, (void*)dout},     {LSE, (void*)lse},
                         {DQ, third(dqkv, C, 0)}, {DK, third(dqkv, C, 1)}, {DV, third(dqkv, C, 2)}};
    return p && execute(*p, p->backward.get(), pointers, stream);
}

#endif  // CUDNN_IMPLEMENTATION
