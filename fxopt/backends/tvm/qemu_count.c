/* A plug-in for qemu-user (TCG plug-in API): executed instructions per function, without a C library.
 * Each translated block adds its instructions to the counter of the function it lies in. One thread. */
#ifndef PLUGIN_VERSION
#define PLUGIN_VERSION 1
#endif
typedef unsigned long long count_t;
typedef count_t id_t;
struct block;
struct instruction;
unsigned long qemu_plugin_tb_n_insns(const struct block *);
struct instruction *qemu_plugin_tb_get_insn(const struct block *, unsigned long);
const char *qemu_plugin_insn_symbol(const struct instruction *);
void qemu_plugin_register_vcpu_tb_trans_cb(id_t, void (*)(id_t, struct block *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct block *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_atexit_cb(id_t, void (*)(id_t, void *), void *);
void qemu_plugin_outs(const char *);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_VERSION;

enum { FUNCTIONS = 4096, BLOCKS = 1 << 18, NAME = 120 };
static struct { char name[NAME]; count_t count; } functions[FUNCTIONS];
static struct { int function; unsigned instructions; } blocks[BLOCKS];
static int known, translated;

static int same(const char *a, const char *b) {
  for (int i = 0; i < NAME - 1; i++) {
    if (a[i] != b[i]) return 0;
    if (!a[i]) return 1;
  }
  return 1;
}

static int function_of(const struct block *block) {
  const char *name = qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(block, 0));
  if (!name) name = "?";
  for (int i = 0; i < known; i++)
    if (same(functions[i].name, name)) return i;
  if (known == FUNCTIONS) return 0;
  for (int i = 0; i < NAME - 1 && name[i]; i++) functions[known].name[i] = name[i];
  return known++;
}

static void executed(unsigned cpu, void *data) {
  (void)cpu;
  unsigned long number = (unsigned long)data;
  functions[blocks[number].function].count += blocks[number].instructions;
}

static void translate(id_t id, struct block *block) {
  (void)id;
  if (translated == BLOCKS) return;
  blocks[translated].function = function_of(block);
  blocks[translated].instructions = (unsigned)qemu_plugin_tb_n_insns(block);
  qemu_plugin_register_vcpu_tb_exec_cb(block, executed, 0, (void *)(unsigned long)translated);
  translated++;
}

static void finish(id_t id, void *data) {
  (void)id;
  (void)data;
  for (int i = 0; i < known; i++) {
    char digits[24];
    int at = 23;
    digits[at] = 0;
    count_t rest = functions[i].count;
    do digits[--at] = (char)('0' + rest % 10);
    while (rest /= 10);
    qemu_plugin_outs("executed ");
    qemu_plugin_outs(functions[i].name);
    qemu_plugin_outs(" ");
    qemu_plugin_outs(digits + at);
    qemu_plugin_outs("\n");
  }
}

__attribute__((visibility("default"))) int qemu_plugin_install(id_t id, const void *info, int count, char **arguments) {
  (void)info;
  (void)count;
  (void)arguments;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_atexit_cb(id, finish, 0);
  return 0;
}
