/* SPDX-License-Identifier: GPL-2.0-only */
/* All that the stub knows of TDX: how a TD starts, and three calls. */
	.section .reset, "a"
	.code32
	jmp	start32
	.org	0x10

	.macro	vmcall
	xorl	%r10d, %r10d			/* R11 is a function of the GHCI */
	movl	$0xfc00, %ecx			/* R10 to R15, and nothing else, are the VMM's */
	xorl	%eax, %eax			/* TDG.VP.VMCALL */
	tdcall
	.endm

	.section .text
	.code64
	.globl	machine_accept, machine_putc, machine_fatal
/* u64 machine_accept(u64 gpa_and_level): TDG.MEM.PAGE.ACCEPT */
machine_accept:
	movq	%rdi, %rcx
	movl	$6, %eax
	tdcall
	ret

/* void machine_putc(char c): a byte to COM1. There is no waiting: QEMU's port is always ready. */
machine_putc:
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movl	$30, %r11d			/* I/O instruction */
	movl	$1, %r12d			/* one byte */
	movl	$1, %r13d			/* out */
	movl	$0x3f8, %r14d
	movzbl	%dil, %r15d
	vmcall
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	ret

/*
 * void machine_fatal(const char *message, u32 code): ReportFatalError. The low 16 bits of R12
 * have to be 0. QEMU shows R14 and R15 as text: the message has to have 16 bytes.
 */
machine_fatal:
	movl	%esi, %r12d
	shlq	$16, %r12
	movl	$0x10003, %r11d
	xorl	%r13d, %r13d
	movq	(%rdi), %r14
	movq	8(%rdi), %r15
	vmcall
	jmp	machine_fatal

	.section .note.GNU-stack, "", @progbits
