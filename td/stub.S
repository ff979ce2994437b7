/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Firmware for a TD that only starts the Linux it carries: entry, mode switch, and what QEMU
 * reads of the image. stub.c does the rest.
 */
#include "layout.h"

	.section .text
	.code32
	.globl	start32
/*
 * A TD's vCPU is in flat protected mode with paging off. ECX is the HOB list. There is no IDT,
 * and most of what firmware does at this point would be a #VE: no CPUID, no MSR, no I/O here.
 */
start32:
	cld
	movl	%ecx, %edi
	lgdt	gdtr
	movl	$BOOT_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss

	/* Keep what is set: a TD must not clear CR4.MCE or CR0.NE. */
	movl	%cr4, %eax
	orl	$(1 << 5), %eax			/* PAE */
	movl	%eax, %cr4
	movl	$pml4, %eax
	movl	%eax, %cr3

	/* EFER.LME is set already in a TD, where EFER can't be written. */
	movl	%cr0, %eax
	orl	$(1 << 31), %eax		/* PG */
	movl	%eax, %cr0
	ljmp	$BOOT_CS, $start64

	.code64
start64:
	movl	$STACK_TOP, %esp
	call	stub_main			/* %rdi: the HOB list, zero-extended */
	movl	$BOOT_PARAMS, %esi
	jmp	*%rax

	.section .rodata
	.balign	8
	/* Accessed is set everywhere: the CPU has no cause to write to the image. */
gdt:	.quad	0
	.quad	0
	.quad	0x00af9b000000ffff		/* BOOT_CS: 64-bit code */
	.quad	0x00cf93000000ffff		/* BOOT_DS: flat data */
gdtr:	.word	gdtr - gdt - 1
	.long	gdt

	/* The first 4 GB, identity-mapped by 1 GB pages, which every TD has; no shared bit. */
	.section .pgtable, "a"
pml4:	.quad	pdpt + 0x23			/* present, writable, accessed */
	.fill	511, 8, 0
pdpt:	.quad	0x000000e3, 0x400000e3, 0x800000e3, 0xc00000e3
	.fill	508, 8, 0

/*
 * The last 256 bytes: what QEMU reads, each at a fixed distance from the end. There is no
 * attribute MR.EXTEND (1): nobody attests this TD, and it would make 16 calls for each page.
 */
	.section .tail, "a"
tail:
	.macro	tdvf_section type, offset, raw_size, base, size
	.long	\offset, \raw_size
	.quad	\base, \size
	.long	\type, 0
	.endm

metadata:
	.ascii	"TDVF"
	.long	metadata_end - metadata, 1, 3	/* length, version, sections */
	tdvf_section 0, 0, IMAGE_SIZE, IMAGE_BASE, IMAGE_SIZE	/* BFV: all of the image */
	tdvf_section 2, 0, 0, HOB_BASE, HOB_SIZE		/* TD_HOB */
	tdvf_section 3, 0, 0, TEMP_BASE, TEMP_SIZE		/* TEMP_MEM */
metadata_end:

	/* The OVMF table is read backwards, from its footer. Lengths include length and GUID. */
	.org	0xb8
table:
	.long	0x100 - (metadata - tail)	/* counted from the end of the image */
	.word	22
	.long	0xe47a6535			/* e47a6535-984a-4798-865e-4685a7bf8ec2 */
	.word	0x984a, 0x4798
	.byte	0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2

	.word	table_end - table
	.long	0x96b582de			/* 96b582de-1fb2-45f7-baea-a366c55a082d */
	.word	0x1fb2, 0x45f7
	.byte	0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d
table_end:
	/* The reset vector, at 0xf0, is in tdcall.S. */
	.org	0xf0

	.section .note.GNU-stack, "", @progbits
