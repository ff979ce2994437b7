// SPDX-License-Identifier: GPL-2.0-only
/*
 * Accept the TD's memory, and load the bzImage that is in the image as the 64-bit boot
 * protocol says. Everything runs in the image, identity-mapped; there are no interrupts and
 * no exception handlers: what is not accepted must not be touched.
 */
#include "layout.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define PAGE_4K		0x1000ULL
#define PAGE_2M		0x200000ULL
#define END_4G		0x100000000ULL

/* What TDG.MEM.PAGE.ACCEPT says to 2 MB if the VMM mapped the memory by smaller pages. */
#define SIZE_MISMATCH	0xc0000b0bULL

#define HOB_RESOURCE	3
#define HOB_END		0xffff
#define RES_RAM		0	/* added by the VMM: accepted */
#define RES_UNACCEPTED	7

struct hob {
	u16	type;
	u16	length;
	u32	reserved;
	/* of a resource descriptor: */
	u8	owner[16];
	u32	resource;
	u32	attributes;
	u64	start;
	u64	size;
};

/* Offsets in boot_params, most of them also in the bzImage. */
#define BP_E820_ENTRIES		0x1e8
#define BP_SETUP_SECTS		0x1f1
#define BP_SYSSIZE		0x1f4
#define BP_HEADER_END		0x201
#define BP_MAGIC		0x202
#define BP_VERSION		0x206
#define BP_LOADER		0x210
#define BP_CODE32_START		0x214
#define BP_CMD_LINE_PTR		0x228
#define BP_XLOADFLAGS		0x236
#define BP_PREF_ADDRESS		0x258
#define BP_INIT_SIZE		0x260
#define BP_E820			0x2d0

#define E820_MAX		128
#define E820_RAM		1
#define E820_RESERVED		2

struct e820_entry {
	u64	start;
	u64	size;
	u32	type;
} __attribute__((packed));

#define FIELD(base, offset, type)	(*(type *)((u8 *)(base) + (offset)))

/* tdcall.S */
u64 machine_accept(u64 gpa_and_level);
void machine_putc(char c);
void machine_fatal(const char *message, u32 code) __attribute__((noreturn));

static u8 *const boot_params = (u8 *)BOOT_PARAMS;
static u8 *const bzimage = (u8 *)IMAGE_BASE + IMAGE_BZIMAGE;

static void copy(void *to, const void *from, u64 size)
{
	asm volatile("rep movsb" : "+D" (to), "+S" (from), "+c" (size) : : "memory");
}

static void zero(void *to, u64 size)
{
	asm volatile("rep stosb" : "+D" (to), "+c" (size) : "a" (0) : "memory");
}

static void print(const char *s)
{
	while (*s)
		machine_putc(*s++);
}

static void print_hex(const char *s, u64 value)
{
	int shift = 60;

	print(s);
	print("0x");
	while (shift && !(value >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		machine_putc("0123456789abcdef"[(value >> shift) & 15]);
}

/* Messages have at least 16 characters: see machine_fatal(). */
static void __attribute__((noreturn)) fatal(const char *message, u32 code)
{
	print("tdstub: ");
	print(message);
	print("\r\n");
	machine_fatal(message, code);
}

static void accept(u64 start, u64 end)
{
	u64 block_end, status;

	while (start < end) {
		block_end = start + PAGE_4K;
		if (!(start % PAGE_2M) && end - start >= PAGE_2M) {
			status = machine_accept(start | 1);
			if (!status) {
				start += PAGE_2M;
				continue;
			}
			/* Ask once for each block, not again for each of its pages. */
			if (status >> 32 == SIZE_MISMATCH)
				block_end = start + PAGE_2M;
		}

		for (; start < block_end; start += PAGE_4K) {
			status = machine_accept(start);
			if (status) {
				print_hex("tdstub: TDG.MEM.PAGE.ACCEPT of ", start);
				print_hex(": ", status);
				print("\r\n");
				fatal("memory was not accepted", 1);
			}
		}
	}
}

static void add_e820(u64 start, u64 end, u32 type)
{
	struct e820_entry *entry = &FIELD(boot_params, BP_E820, struct e820_entry);
	u8 *entries = &boot_params[BP_E820_ENTRIES];

	if (*entries == E820_MAX)
		fatal("too many HOBs for the e820 map", 2);
	entry += (*entries)++;
	entry->start = start;
	entry->size = end - start;
	entry->type = type;
}

/*
 * QEMU's RAM goes through below 1 MB. No system has any at 0xa0000, where a VGA may be instead:
 * accepting MMIO would end the TD. From 0xc0000 it is RAM for us, because Linux looks there for
 * the tables of a BIOS and has to find something accepted, and zero; but it isn't Linux's.
 * What is above 4 GB stays unaccepted and unused.
 */
static const struct window {
	u64	start;
	u64	end;
	int	usable;
} windows[] = {
	{ 0,		0xa0000,	1 },
	{ 0xc0000,	0x100000,	0 },
	{ 0x100000,	END_4G,		1 },
};

static u64 add_memory(const struct hob *hob)
{
	u64 start, end, usable = 0;
	const struct window *w;

	for (w = windows; w < windows + sizeof(windows) / sizeof(windows[0]); w++) {
		start = hob->start > w->start ? hob->start : w->start;
		end = hob->start + hob->size < w->end ? hob->start + hob->size : w->end;
		if (start >= end)
			continue;
		if (hob->resource == RES_UNACCEPTED)
			accept(start, end);
		if (w->usable) {
			add_e820(start, end, E820_RAM);
			usable += end - start;
		}
	}
	return usable;
}

static void walk_hobs(const struct hob *hob)
{
	u64 usable = 0;

	for (; hob->type != HOB_END; hob = (const void *)((const u8 *)hob + hob->length)) {
		if (hob->length < 8)
			fatal("the HOB list is broken", 3);
		if (hob->type == HOB_RESOURCE &&
		    (hob->resource == RES_RAM || hob->resource == RES_UNACCEPTED))
			usable += add_memory(hob);
	}
	print_hex("tdstub: accepted, for Linux: ", usable);
	print(" bytes\r\n");
}

/* Is all of this one piece of memory that Linux may use? */
static int is_ram(u64 start, u64 size)
{
	struct e820_entry *entry = &FIELD(boot_params, BP_E820, struct e820_entry);
	int i;

	for (i = 0; i < boot_params[BP_E820_ENTRIES]; i++, entry++)
		if (entry->type == E820_RAM && start >= entry->start &&
		    start + size <= entry->start + entry->size)
			return 1;
	return 0;
}

/* mkimage has looked at the header: it is a bzImage with a 64-bit entry. */
static u64 load_kernel(void)
{
	u64 setup_size = ((bzimage[BP_SETUP_SECTS] ?: 4) + 1) * 512;
	u64 size = FIELD(bzimage, BP_SYSSIZE, u32) * 16ULL;
	u64 load = FIELD(bzimage, BP_PREF_ADDRESS, u64);
	u64 need = FIELD(bzimage, BP_INIT_SIZE, u32);

	print_hex("tdstub: Linux goes to ", load);
	print_hex(" and needs ", need);
	print(" bytes there\r\n");
	if (!is_ram(load, need > size ? need : size))
		fatal("too little memory for this kernel (-m)", 4);

	copy((void *)load, bzimage + setup_size, size);
	copy(boot_params + BP_SETUP_SECTS, bzimage + BP_SETUP_SECTS,
	     BP_MAGIC + bzimage[BP_HEADER_END] - BP_SETUP_SECTS);
	boot_params[BP_LOADER] = 0xff;
	FIELD(boot_params, BP_CODE32_START, u32) = load;
	FIELD(boot_params, BP_CMD_LINE_PTR, u32) = CMDLINE;
	return load;
}

/*
 * The table of the MP specification that says: one CPU. Without it, or ACPI's, Linux takes the
 * local APIC for one that is not in x2APIC mode.
 */
static struct {
	char	signature[4];
	u32	table;
	u8	length;
	u8	version;
	u8	checksum;
	u8	features[5];
} __attribute__((packed)) *const mp_pointer = (void *)MP_TABLE;

static struct {
	char	signature[4];
	u16	length;
	u8	version;
	u8	checksum;
	char	product[20];
	u32	oem_table;
	u16	oem_size;
	u16	entries;
	u32	local_apic;
	u32	reserved;
	struct {
		u8	type;
		u8	apic_id;
		u8	apic_version;
		u8	flags;
		u32	signature;
		u32	features;
		u32	reserved[2];
	} cpu;
} __attribute__((packed)) *const mp_table = (void *)(MP_TABLE + 16);

static u8 checksum(const void *data, u64 size)
{
	const u8 *p = data;
	u8 sum = 0;

	while (size--)
		sum -= *p++;
	return sum;
}

static void write_mp_table(void)
{
	copy(mp_pointer->signature, "_MP_", 4);
	mp_pointer->table = MP_TABLE + 16;
	mp_pointer->length = 1;
	mp_pointer->version = 4;
	mp_pointer->checksum = checksum(mp_pointer, sizeof(*mp_pointer));

	copy(mp_table->signature, "PCMP", 4);
	mp_table->length = sizeof(*mp_table);
	mp_table->version = 4;
	mp_table->entries = 1;
	mp_table->local_apic = 0xfee00000;
	mp_table->cpu.apic_version = 0x14;
	mp_table->cpu.flags = 3;		/* enabled, the first one */
	mp_table->checksum = checksum(mp_table, sizeof(*mp_table));
}

/* Returns the 64-bit entry of the kernel. */
u64 stub_main(const struct hob *hobs)
{
	print("tdstub: started\r\n");
	zero(boot_params, PAGE_4K);
	copy((void *)CMDLINE, (void *)IMAGE_BASE, CMDLINE_SIZE);
	walk_hobs(hobs);
	write_mp_table();
	add_e820(IMAGE_BASE, END_4G, E820_RESERVED);
	return load_kernel() + 0x200;
}
