/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where things are, for the assembler and the C code. IMAGE_BASE, IMAGE_SIZE and
 * CMDLINE_SIZE come from mkimage.
 */
#ifndef LAYOUT_H
#define LAYOUT_H

/*
 * Low memory. QEMU adds these pages to the TD before it runs (the TD_HOB and TEMP_MEM
 * sections), so that they can be used before anything is accepted. All of it is plain RAM
 * to Linux, which copies boot_params and the command line before it allocates any. The
 * decompressor takes the pages below 0x9f000 or the EBDA for a trampoline: stay away.
 */
#define HOB_BASE	0x10000
#define HOB_SIZE	0x2000
#define TEMP_BASE	0x20000
#define TEMP_SIZE	0x8000

#define BOOT_PARAMS	TEMP_BASE
#define CMDLINE		(TEMP_BASE + 0x1000)
#define STACK_TOP	(TEMP_BASE + TEMP_SIZE)

/* Where Linux looks for the tables of a BIOS. */
#define MP_TABLE	0xf0000

/* The image starts with one page for the command line, the bzImage follows. */
#define IMAGE_BZIMAGE	0x1000

/* What the boot protocol wants the selectors to be. */
#define BOOT_CS		0x10
#define BOOT_DS		0x18

#endif
