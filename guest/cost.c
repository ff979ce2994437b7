// SPDX-License-Identifier: GPL-2.0
/*
 * What operations on guest_memfd cost when nothing is wrong.  On a machine whose clock
 * counts instructions (QEMU -icount shift=0) RDTSC does so, too, of kernel, guest and
 * this program.
 *
 * Prints lines of "cost OPERATION BYTES INSTRUCTIONS": the least of some rounds, as a
 * timer may tick in any.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>
#include <linux/falloc.h>
#include <linux/kvm.h>

#define PAGE		4096ull
#define MiB		(1024 * 1024ull)
#define BASE		(256 * MiB)	/* guest physical, of the memory in question */
#define HUGE		(2 * MiB)
#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE

struct vm {
	int fd, vcpu, gmem;
	struct kvm_run *run;
	char *code, *host;		/* host: the shared copy, or the file itself */
	uint64_t size;
	bool private, in_place;
};

static int kvm;

#define check(call) ({ long r_ = (long)(call); if (r_ == -1) err(1, "%d: %s", __LINE__, #call); r_; })

static inline uint64_t count(void)
{
	uint32_t low, high;

	asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high) :: "memory");
	return (uint64_t)high << 32 | low;
}

/* What has been seen of operations so far, in one round or several. */
static struct {
	char name[32];
	uint64_t least;
} ops[64];

static void took(const char *prefix, const char *name, uint64_t start)
{
	uint64_t n = count() - start;
	char full[32];
	int i;

	snprintf(full, sizeof(full), "%s%s", prefix, name);
	for (i = 0; ops[i].name[0] && strcmp(ops[i].name, full); i++)
		;
	if (!ops[i].name[0] || n < ops[i].least)
		ops[i].least = n;
	strcpy(ops[i].name, full);
}

static void print(uint64_t size)
{
	for (int i = 0; ops[i].name[0]; i++) {
		printf("cost %s %lu %lu\n", ops[i].name, size, ops[i].least);
		ops[i].name[0] = 0;
	}
}

static void slot(struct vm *vm, uint64_t size)
{
	struct kvm_userspace_memory_region2 region = {
		.slot = 1,
		.flags = KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr = BASE,
		.memory_size = size,
		.userspace_addr = (uintptr_t)vm->host,
		.guest_memfd = vm->gmem,
	};

	check(ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION2, &region));
}

/* Zap what the guest has mapped. */
static void forget(struct vm *vm)
{
	slot(vm, 0);
	slot(vm, vm->size);
}

static void set_attributes(struct vm *vm, uint64_t offset, uint64_t size, uint64_t attributes)
{
	struct kvm_memory_attributes all = {
		.address = BASE + offset, .size = size, .attributes = attributes,
	};
	struct kvm_memory_attributes2 file = {
		.offset = offset, .size = size, .attributes = attributes,
	};

	if (vm->in_place)
		check(ioctl(vm->gmem, KVM_SET_MEMORY_ATTRIBUTES2, &file));
	else
		check(ioctl(vm->fd, KVM_SET_MEMORY_ATTRIBUTES, &all));
}

static void punch(struct vm *vm, uint64_t offset, uint64_t size)
{
	check(fallocate(vm->gmem, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size));
}

static void prefault(struct vm *vm)
{
	struct kvm_pre_fault_memory range = { .gpa = BASE, .size = vm->size };

	while (range.size)
		check(ioctl(vm->vcpu, KVM_PRE_FAULT_MEMORY, &range));
}

/* The guest writes to one page in @stride bytes. */
static void guest_strides(struct vm *vm, uint64_t offset, uint64_t size, uint64_t stride)
{
	struct kvm_regs regs = {
		.rip = 0, .rflags = 2, .rdi = BASE + offset, .rsi = BASE + offset + size,
		.rcx = stride,
	};

	check(ioctl(vm->vcpu, KVM_SET_REGS, &regs));
	check(ioctl(vm->vcpu, KVM_RUN, 0));
	if (vm->run->exit_reason != KVM_EXIT_HLT)
		errx(1, "the guest left for reason %u", vm->run->exit_reason);
}

static void guest(struct vm *vm, uint64_t offset, uint64_t size)
{
	guest_strides(vm, offset, size, PAGE);
}

static void host(struct vm *vm, uint64_t offset, uint64_t size)
{
	for (uint64_t i = offset; i < offset + size; i += PAGE)
		*(volatile char *)(vm->host + i) = 1;
}

static struct vm *new_vm(uint64_t size, bool private, uint64_t flags)
{
	/* movb %al,(%edi); add %ecx,%edi; cmp %esi,%edi; jb; hlt */
	static const char loop[] = "\x88\x07\x01\xcf\x39\xf7\x72\xf8\xf4";
	struct kvm_create_guest_memfd file = { .size = size, .flags = flags };
	static struct vm vm;
	struct kvm_segment flat = {
		.limit = -1, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1, .selector = 16,
	};
	struct kvm_sregs sregs;

	vm = (struct vm){ .size = size, .private = private };
	vm.fd = check(ioctl(kvm, KVM_CREATE_VM, private ? KVM_X86_SW_PROTECTED_VM : KVM_X86_DEFAULT_VM));
	vm.in_place = private && ioctl(vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES) > 0;
	if (!private)
		file.flags |= GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
	if (vm.in_place)
		file.flags |= GUEST_MEMFD_FLAG_MMAP;

	vm.code = (char *)check(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	memcpy(vm.code, loop, sizeof(loop));
	check(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &(struct kvm_userspace_memory_region) {
		.memory_size = PAGE, .userspace_addr = (uintptr_t)vm.code }));

	vm.gmem = check(ioctl(vm.fd, KVM_CREATE_GUEST_MEMFD, &file));
	/* At 2M, so that page tables may be, too. */
	vm.host = (char *)check(mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	vm.host = (char *)(((uintptr_t)vm.host + HUGE - 1) & -HUGE);
	if (file.flags & GUEST_MEMFD_FLAG_MMAP)
		check(mmap(vm.host, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, vm.gmem, 0));
	else
		check(mmap(vm.host, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	slot(&vm, size);
	if (private && !vm.in_place)
		set_attributes(&vm, 0, size, PRIVATE);

	vm.vcpu = check(ioctl(vm.fd, KVM_CREATE_VCPU, 0));
	vm.run = (void *)check(mmap(NULL, check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE,
				    MAP_SHARED, vm.vcpu, 0));
	/* Protected mode, flat. */
	check(ioctl(vm.vcpu, KVM_GET_SREGS, &sregs));
	sregs.ds = sregs.es = sregs.ss = flat;
	flat.type = 11;
	flat.selector = 8;
	sregs.cs = flat;
	sregs.cr0 |= 1;
	check(ioctl(vm.vcpu, KVM_SET_SREGS, &sregs));
	return &vm;
}

static void end_vm(struct vm *vm)
{
	munmap(vm->run, check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)));
	munmap(vm->code, PAGE);
	munmap(vm->host, vm->size);
	if (vm->gmem >= 0)
		close(vm->gmem);
	close(vm->vcpu);
	close(vm->fd);
}

#define measure_as(prefix, name, what)		\
do {						\
	uint64_t start_ = count();		\
						\
	what;					\
	took(prefix, name, start_);		\
} while (0)
#define measure(name, what)	measure_as("", name, what)

/* What there is on every kernel. */
static void faults(uint64_t size)
{
	struct vm *vm = new_vm(size, true, 0);

	/* The first fault of a vCPU is a long story. */
	prefault(vm);
	punch(vm, 0, size);
	measure("pre-fault,absent", prefault(vm));
	forget(vm);
	measure("pre-fault,present", prefault(vm));
	measure("punch", punch(vm, 0, size));
	measure("guest-fault,absent", guest(vm, 0, size));
	forget(vm);
	measure("guest-fault,present", guest(vm, 0, size));
	munmap(vm->host, size);
	measure("close", (close(vm->gmem), vm->gmem = -1));
	end_vm(vm);

	vm = new_vm(size, false, 0);
	measure("host-fault,absent", host(vm, 0, size));
	check(madvise(vm->host, size, MADV_DONTNEED));
	measure("host-fault,present", host(vm, 0, size));
	end_vm(vm);
}

/* Pages that are not free. */
static long used(void)
{
	struct sysinfo info;

	check(sysinfo(&info));
	return (long)((info.totalram - info.freeram) * info.mem_unit);
}

/* How much memory one conversion takes meanwhile, and when it is done. */
static void peaks(uint64_t size)
{
	struct vm *vm = new_vm(size, true, 0);
	long before, most, now;

	guest(vm, 0, size);
	most = before = used();
#define step(what) do { what; now = used(); if (now > most) most = now; } while (0)
	step(set_attributes(vm, 0, size, 0));
	if (!vm->in_place)
		step(punch(vm, 0, size));
	step(host(vm, 0, size));
	printf("cost peak,to-shared %lu %ld\n", size, most - before);

	most = before = used();
	step(set_attributes(vm, 0, size, PRIVATE));
	if (!vm->in_place)
		step(check(madvise(vm->host, size, MADV_DONTNEED)));
	step(guest(vm, 0, size));
#undef step
	printf("cost peak,to-private %lu %ld\n", size, most - before);
	end_vm(vm);
}

/* Until the other side has touched the memory. What a VMM does: give the old copy back. */
static void conversions(uint64_t size)
{
	struct vm *vm = new_vm(size, true, 0);

	guest(vm, 0, size);
	measure("to-shared", ({
		set_attributes(vm, 0, size, 0);
		if (!vm->in_place)
			punch(vm, 0, size);
		host(vm, 0, size);
	}));
	measure("to-private", ({
		set_attributes(vm, 0, size, PRIVATE);
		if (!vm->in_place)
			check(madvise(vm->host, size, MADV_DONTNEED));
		guest(vm, 0, size);
	}));
	end_vm(vm);
}

static void print_inode_size(void)
{
	FILE *f = fopen("/sys/kernel/slab/kvm_gmem_inode_cache/object_size", "r");
	unsigned int size;

	if (!f || fscanf(f, "%u", &size) != 1)
		err(1, "kvm_gmem_inode_cache");
	printf("cost inode 0 %u\n", size);
	fclose(f);
}

/* What becomes of 2 MiB, as a folio or as 512. */
static void folios(bool huge)
{
	const char *as = huge ? "2M:" : "4K:";
	uint64_t flags = huge ? GUEST_MEMFD_FLAG_HUGEPAGE : 0;
	struct vm *vm = new_vm(2 * HUGE, true, flags);

	measure_as(as, "absent", guest(vm, 0, HUGE));
	forget(vm);
	measure_as(as, "present", guest(vm, 0, HUGE));
	if (vm->in_place) {
		measure_as(as, "to-shared", set_attributes(vm, 0, HUGE, 0));
		measure_as(as, "to-private", set_attributes(vm, 0, HUGE, PRIVATE));
		guest(vm, 0, HUGE);
		measure_as(as, "to-shared,first", set_attributes(vm, 17 * PAGE, PAGE, 0));
		guest(vm, 0, HUGE);
		measure_as(as, "to-shared,next", set_attributes(vm, 19 * PAGE, PAGE, 0));
	}
	end_vm(vm);

	vm = new_vm(2 * HUGE, true, flags);
	guest(vm, 0, HUGE);
	measure_as(as, "punch-4K", punch(vm, 17 * PAGE, PAGE));
	end_vm(vm);

	vm = new_vm(2 * HUGE, true, flags);
	guest(vm, 0, HUGE);
	munmap(vm->host, 2 * HUGE);
	measure_as(as, "close", (close(vm->gmem), vm->gmem = -1));
	end_vm(vm);
}

/* Every other page of 2 MiB is healthy; @nr of those between are not. */
static void poison(bool huge, int nr)
{
	struct vm *vm = new_vm(2 * HUGE, false, huge ? GUEST_MEMFD_FLAG_HUGEPAGE : 0);
	char name[32];

	host(vm, 0, HUGE);
	for (int i = 0; i < nr; i++)
		check(madvise(vm->host + (2 * i + 1) * PAGE, PAGE, MADV_HWPOISON));
	forget(vm);
	snprintf(name, sizeof(name), "poisoned,%d", nr);
	measure_as(huge ? "2M:" : "4K:", name, guest_strides(vm, 0, HUGE, 2 * PAGE));
	if (nr == 1) {
		munmap(vm->host, 2 * HUGE);
		measure_as(huge ? "2M:" : "4K:", "close,poisoned", (close(vm->gmem), vm->gmem = -1));
	}
	end_vm(vm);
}

static void write_number(const char *path, unsigned long n)
{
	FILE *f = fopen(path, "w");

	if (!f || fprintf(f, "%lu", n) < 0 || fclose(f))
		err(1, "%s", path);
}

#define FAIL_ZAP	"/sys/kernel/debug/fail_guest_memfd_zap/"
#define FAIL_RECLAIM	"/sys/kernel/debug/fail_guest_memfd_reclaim/"

/*
 * Of 2 MiB that the guest has mapped, let the zap of @nr pages fail, and if @again let
 * them get stuck once more when the file is closed.
 */
static void marks(bool huge, int nr, bool again)
{
	struct vm *vm = new_vm(2 * HUGE, true, huge ? GUEST_MEMFD_FLAG_HUGEPAGE : 0);
	const char *as = huge ? "2M:" : "4K:";
	char name[32];

	guest(vm, 0, HUGE);
	write_number(FAIL_ZAP "verbose", 0);
	write_number(FAIL_ZAP "first-gfn", BASE / PAGE);
	write_number(FAIL_ZAP "last-gfn", BASE / PAGE + nr - 1);
	write_number(FAIL_ZAP "times", nr);
	write_number(FAIL_ZAP "probability", nr ? 100 : 0);
	snprintf(name, sizeof(name), "zap,%d-stuck", nr);
	measure_as(as, name, slot(vm, 0));
	write_number(FAIL_ZAP "probability", 0);
	/* Not before, as that zaps what the guest has mapped. */
	munmap(vm->host, 2 * HUGE);
	if (nr) {
		write_number(FAIL_RECLAIM "verbose", 0);
		write_number(FAIL_RECLAIM "first-index", 0);
		write_number(FAIL_RECLAIM "last-index", HUGE / PAGE - 1);
		write_number(FAIL_RECLAIM "times", nr);
		write_number(FAIL_RECLAIM "probability", again ? 100 : 0);
		measure_as(as, again ? "close,again" : "close,stuck", (close(vm->gmem), vm->gmem = -1));
		write_number(FAIL_RECLAIM "probability", 0);
	}
	end_vm(vm);
}

static void on_sigbus(int signal)
{
	(void)signal;
}

int main(void)
{
	static const uint64_t sizes[] = { PAGE, 2 * MiB, 16 * MiB };

	setbuf(stdout, NULL);
	kvm = check(open("/dev/kvm", O_RDWR));
	for (int i = 0; i < 3; i++) {
		for (int round = 0; round < 3; round++) {
			faults(sizes[i]);
			conversions(sizes[i]);
		}
		print(sizes[i]);
	}
	peaks(16 * MiB);
	print_inode_size();

	if (!(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_HUGEPAGE))
		return 0;
	/* MADV_HWPOISON sends it as if the page had been touched: it can't be ignored. */
	signal(SIGBUS, on_sigbus);
	for (int huge = 0; huge < 2; huge++) {
		for (int round = 0; round < 3; round++)
			folios(huge);
		for (int i = 0; i < 4; i++)
			poison(huge, (int[]){ 0, 1, 16, 256 }[i]);
	}
	/* Last, as what it takes to make zaps fail is never switched off again. */
	if (!access(FAIL_ZAP "probability", W_OK)) {
		klogctl(8, NULL, 1);	/* messages cost more than marking */
		for (int huge = 0; huge < 2; huge++)
			for (int i = 0; i < 3; i++)
				marks(huge, i ? 512 : 0, i == 2);
		klogctl(8, NULL, 7);
	}
	print(HUGE);
	return 0;
}
