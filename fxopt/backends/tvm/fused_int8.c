/* ONNX Runtime's custom operators of the domain fxopt, over kernels of fxopt.backends.tvm.kernels.

   FusedLinearInt8: y = epilogue((x - x_zero) @ weight.T * scales + bias), codes = clamp(round(y * inverse) + y_zero)
     inputs:  x uint8 [..., in], weight int8 [out, in] (constant), scales float [out], bias float [out]; where the form
              has them: inverse float [out], residual float [..., out], gamma float [out], beta float [out]
     outputs: y float [..., out], codes uint8 [..., out]; those that the attributes floats and codes ask for
     attributes: x_zero, y_zero, epilogue (its place in EPILOGUES), floats, codes (int), eps (float, of the layer norm)
   SparseLinearInt8: the same for a weight of which most blocks of four outputs x one input are zero (sparse_int8.c)
   QuantizeRows: codes = clamp(round(x * inverse) + zero)
     inputs: x float [..., n], inverse float [n]; attribute: zero (int)
   LayerNormQuantizeRows: codes = clamp(round(layer_norm(x) * inverse) + zero)
     inputs: x float [..., n], inverse, gamma, beta float [n]; attributes: zero (int), eps (float)
   AttentionInt8: codes = clamp(round(softmax((q - 128) (k - 128)^T * factor + mask) (v - 128) * inverse) + zero)
     inputs: q uint8 [batch, queries, n], k, v uint8 [batch, keys, n], inverse float [n] (scale of v over that of the
             result, per channel), optionally mask float [1 or batch, 1, 1 or queries, keys], which is added to the scores
     attributes: num_heads (int), factor (float, scales of q and k and that of the scores), zero (int)

   The kernels of a model are the tables of kernels.h (generated); the best of those that this CPU runs is taken when a
   node is loaded, and the weight is packed for it then. Rows are shared out to the session's threads. */
#include "ort_abi.h"

typedef void Function(const i32 *rows, const u8 *q, const void *w, const i32 *starts, const float *scales,
                      const float *bias, const float *residual, const float *gamma, const float *beta, float *y,
                      u8 *codes, const float *inverse, const float *zero);
typedef struct {
  i32 level, inner, outputs, epilogue, floats, codes;
  float eps;
} Sizes;
typedef struct {
  Sizes sizes;
  i32 columns, group;
  Function *run;
} Form;

typedef void SparseFunction(const i32 *rows, const u8 *panel, const i32 *stream, const i32 *firsts, const i32 *starts,
                            const float *scales, const float *bias, const float *residual, const float *gamma,
                            const float *beta, float *y, u8 *codes, const float *inverse, const float *zero);
typedef struct {
  Sizes sizes;
  i32 group;
  SparseFunction *run;
} SparseForm;

typedef void TurnFunction(const i32 *sizes, u8 *rows, u8 *panel);
typedef struct {
  i32 level, into_panel;
  TurnFunction *run;
} TurnForm;

typedef void RowFunction(const i32 *rows, const float *x, const float *gamma, const float *beta, const float *inverse,
                         const float *zero, u8 *codes);
typedef struct {
  i32 level, size, has_norm;
  float eps;
  RowFunction *run;
} RowForm;

typedef void AttentionFunction(const i32 *sizes, const u8 *q, const u8 *k, const u8 *v, const float *mask,
                               const float *factor, const float *inverse, const float *zero, u8 *codes, void *packed,
                               float *floats, u8 *bytes);
typedef struct {
  i32 level, width, stride, rows, columns, group;
  AttentionFunction *run;
} AttentionForm;

/* The extern functions and the tables: static const Form KERNELS[COUNT + 1], SparseForm SPARSE_KERNELS[SPARSE_COUNT + 1],
   TurnForm TURN_KERNELS[TURN_COUNT + 1], RowForm ROW_KERNELS[ROW_COUNT + 1],
   AttentionForm ATTENTION_KERNELS[ATTENTION_COUNT + 1]. */
#include "kernels.h"

enum { AVX2 = 1, AVX_VNNI = 2, AVX512_VNNI = 3 };
enum { RESIDUAL_SUM = 4, LAYER_NORM = 5 };
enum { X, WEIGHT, SCALES, BIAS, INVERSE, RESIDUAL, GAMMA, BETA, INPUTS };
enum { Y, CODES, OUTPUTS };
enum { CHUNK = 64, RANK = 8 }; /* rows that one thread takes at a time */

void *malloc(usize);
void free(void *);

typedef struct {
  Api api;
  const Form *form;
  void *weight;
  i32 *starts;
  float zero;
} Kernel;

typedef struct {
  const void *kernel;
  i64 rows;
  void *in[INPUTS], *out[OUTPUTS];
} Work;

static void cpuid(unsigned leaf, unsigned sub, unsigned r[4]) {
  __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}

/* The best level that the processor has and the operating system saves the registers of. */
i32 fxopt_cpu_level(void) {
  unsigned r[4], seven[4], one[4], low, high;
  cpuid(0, 0, r);
  if (r[0] < 7) return 0;
  cpuid(1, 0, one);
  if (!(one[2] >> 27 & 1) || !(one[2] >> 12 & 1)) return 0; /* OSXSAVE, FMA */
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  cpuid(7, 0, seven);
  if ((low & 6) != 6 || !(seven[1] >> 5 & 1)) return 0; /* AVX2 */
  unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* AVX-512 F, DQ, BW, VL */
  if ((low & 0xe6) == 0xe6 && (seven[1] & wanted) == wanted && (seven[2] >> 11 & 1)) return AVX512_VNNI;
  if (seven[0] >= 1) {
    cpuid(7, 1, r);
    if (r[0] >> 4 & 1) return AVX_VNNI;
  }
  return AVX2;
}

#define CHECK(call)               \
  do {                            \
    Status *failed = (call);      \
    if (failed) return failed;    \
  } while (0)

static Status *shape_of(Api api, const void *value, i64 sizes[RANK], usize *rank) {
  void *shape;
  CHECK(GetTensorTypeAndShape(value, &shape));
  Status *failed = GetDimensionsCount(shape, rank);
  if (!failed && *rank > RANK) failed = CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: more than 8 dimensions");
  if (!failed) failed = GetDimensions(shape, sizes, *rank);
  ReleaseTensorTypeAndShapeInfo(shape);
  return failed;
}

/* The best of some forms, which start with their sizes, that this CPU runs; NULL where there is none. */
static const void *find(const void *forms, i32 count, usize stride, const Sizes *wanted) {
  const Sizes *best = 0;
  for (i32 i = 0; i < count; i++) {
    const Sizes *form = (const void *)((const char *)forms + (usize)i * stride);
    if (form->inner != wanted->inner || form->outputs != wanted->outputs || form->epilogue != wanted->epilogue) continue;
    if (form->floats != wanted->floats || form->codes != wanted->codes) continue;
    if (form->epilogue == LAYER_NORM && form->eps != wanted->eps) continue;
    if (form->level <= wanted->level && (!best || best->level < form->level)) best = form;
  }
  return best;
}

/* What a linear's node asks for, its zero points (of x and of the codes) and its weight. */
static Status *asked(Api api, const void *info, Sizes *wanted, i64 zeros[2], const signed char **weight) {
  i64 epilogue, floats, codes, sizes[RANK];
  i32 is_constant;
  usize rank;
  const void *value;
  CHECK(KernelInfoGetAttribute_int64(info, "x_zero", &zeros[0]));
  CHECK(KernelInfoGetAttribute_int64(info, "y_zero", &zeros[1]));
  CHECK(KernelInfoGetAttribute_int64(info, "epilogue", &epilogue));
  CHECK(KernelInfoGetAttribute_int64(info, "floats", &floats));
  CHECK(KernelInfoGetAttribute_int64(info, "codes", &codes));
  CHECK(KernelInfoGetAttribute_float(info, "eps", &wanted->eps));
  CHECK(KernelInfoGetConstantInput_tensor(info, WEIGHT, &is_constant, &value));
  if (!is_constant) return CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: a linear's weight must be an initializer");
  CHECK(shape_of(api, value, sizes, &rank));
  if (rank != 2) return CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: a linear's weight has two dimensions");
  CHECK(GetTensorMutableData((void *)value, (void **)weight));
  wanted->level = fxopt_cpu_level();
  wanted->outputs = (i32)sizes[0], wanted->inner = (i32)sizes[1];
  wanted->epilogue = (i32)epilogue, wanted->floats = (i32)floats, wanted->codes = (i32)codes;
  return 0;
}

static Status *no_kernel(Api api) {
  return CreateStatus(ORT_INVALID_ARGUMENT,
                      "fxopt: this library has no kernel for the linear's sizes on this CPU (at least AVX2)");
}

static void pack(const Form *form, const signed char *weight, i64 zero, void *packed, i32 *starts) {
  i64 inner = form->sizes.inner, outputs = form->sizes.outputs, columns = form->columns, group = form->group;
  i64 panels = (outputs + columns - 1) / columns;
  for (i64 n = 0; n < panels * columns; n++) {
    i64 sum = 0;
    for (i64 k = 0; k < inner; k++) {
      i32 code = n < outputs ? weight[n * inner + k] : 0;
      i64 to = ((n / columns * (inner / group) + k / group) * columns + n % columns) * group + k % group;
      if (group == 4)
        ((signed char *)packed)[to] = (signed char)code;
      else
        ((short *)packed)[to] = (short)code;
      sum += code;
    }
    starts[n] = (i32)(-zero * sum);
  }
}

static void destroy(void *given) {
  Kernel *kernel = given;
  if (!kernel) return;
  free(kernel->weight);
  free(kernel->starts);
  free(kernel);
}

static Status *create(const CustomOp *op, Api api, const void *info, void **made) {
  (void)op;
  Sizes wanted;
  i64 zeros[2];
  const signed char *weight;
  CHECK(asked(api, info, &wanted, zeros, &weight));
  const Form *form = find(KERNELS, COUNT, sizeof *form, &wanted);
  if (!form) return no_kernel(api);
  usize padded = (usize)((wanted.outputs + form->columns - 1) / form->columns * form->columns);
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CreateStatus(ORT_FAIL, "FusedLinearInt8: out of memory");
  *kernel = (Kernel){api, form, malloc(padded * (usize)wanted.inner * (form->group == 4 ? 1 : 2)),
                     malloc(padded * sizeof(i32)), (float)zeros[1]};
  if (!kernel->weight || !kernel->starts) {
    destroy(kernel);
    return CreateStatus(ORT_FAIL, "FusedLinearInt8: out of memory");
  }
  pack(form, weight, zeros[0], kernel->weight, kernel->starts);
  *made = kernel;
  return 0;
}

static void part(void *given, usize index) {
  Work *work = given;
  const Kernel *kernel = work->kernel;
  const Sizes *sizes = &kernel->form->sizes;
  i64 first = (i64)index * CHUNK, at = first * sizes->outputs;
  i32 rows = (i32)(work->rows - first < CHUNK ? work->rows - first : CHUNK);
  float *residual = work->in[RESIDUAL], *y = work->out[Y];
  u8 *codes = work->out[CODES];
  kernel->form->run(&rows, (u8 *)work->in[X] + first * sizes->inner, kernel->weight, kernel->starts, work->in[SCALES],
                    work->in[BIAS], residual ? residual + at : 0, work->in[GAMMA], work->in[BETA], y ? y + at : 0,
                    codes ? codes + at : 0, work->in[INVERSE], &kernel->zero);
}

/* Find a linear's operands and results, then run `one` for every CHUNK of rows. */
static Status *run_linear(Work *work, const Sizes *form, Api api, void *context, void (*one)(void *, usize)) {
  i64 sizes[RANK];
  usize rank;
  const void *value;
  for (usize i = 0; i < INPUTS; i++) {
    i32 used = i <= BIAS || (i == INVERSE    ? form->codes
                              : i == RESIDUAL ? form->epilogue >= RESIDUAL_SUM
                                              : form->epilogue == LAYER_NORM);
    if (i == WEIGHT || !used) continue;
    CHECK(KernelContext_GetInput(context, i, &value));
    if (!value) return CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: an input of the linear's form is missing");
    CHECK(GetTensorMutableData((void *)value, &work->in[i]));
    if (i != X && i != RESIDUAL) continue;
    i64 rows = 1;
    CHECK(shape_of(api, value, sizes, &rank));
    for (usize d = 0; d + 1 < rank; d++) rows *= sizes[d];
    if (rank == 0 || sizes[rank - 1] != (i == X ? form->inner : form->outputs) || (i != X && rows != work->rows))
      return CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: x or residual does not have the weight's sizes");
    work->rows = rows;
    sizes[rank - 1] = form->outputs;
  }
  for (usize i = 0; i < OUTPUTS; i++) {
    void *result;
    if (i == Y ? !form->floats : !form->codes) continue;
    CHECK(KernelContext_GetOutput(context, i, sizes, rank, &result));
    if (!result) return CreateStatus(ORT_INVALID_ARGUMENT, "fxopt: an output of the linear's form is missing");
    CHECK(GetTensorMutableData(result, &work->out[i]));
  }
  usize parts = (usize)((work->rows + CHUNK - 1) / CHUNK);
  if (parts > 1) return KernelContext_ParallelFor(context, one, parts, 0, work);
  if (parts) one(work, 0);
  return 0;
}

static Status *compute(void *given, void *context) {
  const Kernel *kernel = given;
  Work work = {.kernel = kernel};
  return run_linear(&work, &kernel->form->sizes, kernel->api, context, part);
}

#include "attention_int8.c"
#include "rows_u8.c"
#include "sparse_int8.c"

/* ---- the operators */

static const char *attention_name(const CustomOp *op) { (void)op; return "AttentionInt8"; }
static usize attention_inputs(const CustomOp *op) { (void)op; return ATTENTION_INPUTS; }
static i32 attention_input_type(const CustomOp *op, usize i) { (void)op; return i <= V ? TYPE_UINT8 : TYPE_FLOAT; }
static i32 attention_input_kind(const CustomOp *op, usize i) { (void)op; return i == MASK ? OPTIONAL : REQUIRED; }

static const char *linear_name(const CustomOp *op) { (void)op; return "FusedLinearInt8"; }
static const char *sparse_name(const CustomOp *op) { (void)op; return "SparseLinearInt8"; }
static const char *quantize_name(const CustomOp *op) { (void)op; return "QuantizeRows"; }
static const char *norm_name(const CustomOp *op) { (void)op; return "LayerNormQuantizeRows"; }
static const char *provider(const CustomOp *op) { (void)op; return 0; /* the CPU */ }
static i32 input_type(const CustomOp *op, usize i) {
  (void)op;
  return i == X ? TYPE_UINT8 : i == WEIGHT ? TYPE_INT8 : TYPE_FLOAT;
}
static i32 floats(const CustomOp *op, usize i) { (void)op; (void)i; return TYPE_FLOAT; }
static i32 bytes(const CustomOp *op, usize i) { (void)op; (void)i; return TYPE_UINT8; }
static i32 output_type(const CustomOp *op, usize i) { (void)op; return i == Y ? TYPE_FLOAT : TYPE_UINT8; }
static usize inputs(const CustomOp *op) { (void)op; return INPUTS; }
static usize outputs(const CustomOp *op) { (void)op; return OUTPUTS; }
static usize quantize_inputs(const CustomOp *op) { (void)op; return ROW_GAMMA; }
static usize norm_inputs(const CustomOp *op) { (void)op; return ROW_INPUTS; }
static usize single(const CustomOp *op) { (void)op; return 1; }
static i32 input_kind(const CustomOp *op, usize i) { (void)op; return i <= BIAS ? REQUIRED : OPTIONAL; }
static i32 output_kind(const CustomOp *op, usize i) { (void)op; (void)i; return OPTIONAL; }
static i32 required(const CustomOp *op, usize i) { (void)op; (void)i; return REQUIRED; }
static i32 memory(const CustomOp *op, usize i) { (void)op; (void)i; return 0; }
static i32 one(const CustomOp *op) { (void)op; return 1; }
static i32 last(const CustomOp *op) { (void)op; return 0x7fffffff; }

#define COMMON                                                                                                      \
  .version = ORT_VERSION, .GetExecutionProviderType = provider, .GetInputMemoryType = memory,                        \
  .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one, .GetVariadicOutputMinArity = one,             \
  .GetVariadicOutputHomogeneity = one, .GetStartVersion = one, .GetEndVersion = last
#define ROWS                                                                                                        \
  .GetInputType = floats, .GetOutputType = bytes, .GetOutputTypeCount = single, .KernelDestroy = free,               \
  .GetInputCharacteristic = required, .GetOutputCharacteristic = required, .KernelComputeV2 = compute_rows

static const CustomOp LINEAR = {
    COMMON,
    .GetName = linear_name,
    .GetInputType = input_type,
    .GetInputTypeCount = inputs,
    .GetOutputType = output_type,
    .GetOutputTypeCount = outputs,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = input_kind,
    .GetOutputCharacteristic = output_kind,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
};
static const CustomOp SPARSE = {
    COMMON,
    .GetName = sparse_name,
    .GetInputType = input_type,
    .GetInputTypeCount = inputs,
    .GetOutputType = output_type,
    .GetOutputTypeCount = outputs,
    .KernelDestroy = destroy_sparse,
    .GetInputCharacteristic = input_kind,
    .GetOutputCharacteristic = output_kind,
    .CreateKernelV2 = create_sparse,
    .KernelComputeV2 = compute_sparse,
};
static const CustomOp ATTENTION = {
    COMMON,
    .GetName = attention_name,
    .GetInputType = attention_input_type,
    .GetInputTypeCount = attention_inputs,
    .GetOutputType = bytes,
    .GetOutputTypeCount = single,
    .KernelDestroy = free,
    .GetInputCharacteristic = attention_input_kind,
    .GetOutputCharacteristic = required,
    .CreateKernelV2 = create_attention,
    .KernelComputeV2 = compute_attention,
};
static const CustomOp QUANTIZE = {
    COMMON, ROWS, .GetName = quantize_name, .GetInputTypeCount = quantize_inputs, .CreateKernelV2 = create_quantize};
static const CustomOp NORM = {
    COMMON, ROWS, .GetName = norm_name, .GetInputTypeCount = norm_inputs, .CreateKernelV2 = create_norm};

/* What ONNX Runtime calls when a session's options register this library. */
Status *RegisterCustomOps(void *options, const ApiBase *base) {
  Api api = base->GetApi(ORT_VERSION);
  if (!api) {
    api = base->GetApi(1);
    return CreateStatus(ORT_FAIL, "this library needs ONNX Runtime 1.17 or later");
  }
  void *domain;
  CHECK(CreateCustomOpDomain("fxopt", &domain));
  CHECK(CustomOpDomain_Add(domain, &LINEAR));
  CHECK(CustomOpDomain_Add(domain, &SPARSE));
  CHECK(CustomOpDomain_Add(domain, &QUANTIZE));
  CHECK(CustomOpDomain_Add(domain, &NORM));
  CHECK(CustomOpDomain_Add(domain, &ATTENTION));
  return AddCustomOpDomain(options, domain); /* the options keep the domain's address: it is never freed */
}
