# The guest that the probe runs on x86_64: what an ordinary kernel does in its first second, in 400 bytes.
#
# It goes from real through protected to long mode, takes a page fault and mends it, takes three interrupts of
# a timer while halted, counts to ten million, and leaves through isa-debug-exit. The counting is what tells a
# processor from a nested KVM that emulates each instruction: a few milliseconds on hardware, 0.1 s under TCG,
# and 11 s there, where all the rest passes in time.
#
# probe_guest.py holds the assembled bytes: as --64 probe_guest.S -o g.o && ld -Ttext=0 --oformat binary g.o

    .equ ROM, 0xffff0000
    .equ EXIT_PORT, 0xf4

    .code16
    .globl _start
_start:
    cli
    cld
    lgdtl %cs:(gdt_pointer - _start)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $(protected - _start + ROM)

    .code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x7000, %esp
    # Page tables from 0x1000: the first 2 MiB, the local APIC and this ROM, in pages of 2 MiB.
    movl $0x1000, %edi
    xorl %eax, %eax
    movl $(0x5000 / 4), %ecx
    rep stosl
    movl $0x2003, 0x1000
    movl $0x3003, 0x2000
    movl $0x4003, 0x2018
    movl $0x83, 0x3000
    movl $0xfee00083, 0x4fb8
    movl $0xffe00083, 0x4ff8
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $0x1000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    ljmpl $24, $(long_mode - _start + ROM)

    .code64
long_mode:
    # The IDT is at 0x8000; only vector 14 (page fault) and 32 (timer) are used.
    movl $0x8000, %edi
    xorl %eax, %eax
    movl $(0x1000 / 4), %ecx
    rep stosl
    movl $(page_fault - _start), %eax
    movl $0x80e0, %edi
    call gate
    movl $(timer - _start), %eax
    movl $0x8200, %edi
    call gate
    lidt idt_pointer(%rip)

    movl $0x300000, %esi
    movl $0x12345678, (%rsi)

    # PIC: vectors from 32, only the timer. PIT: about 1 kHz. Local APIC: let the PIC through.
    movb $0x11, %al
    outb %al, $0x20
    movb $0x20, %al
    outb %al, $0x21
    movb $4, %al
    outb %al, $0x21
    movb $1, %al
    outb %al, $0x21
    movb $0xfe, %al
    outb %al, $0x21
    movb $0x34, %al
    outb %al, $0x43
    movb $0xa9, %al
    outb %al, $0x40
    movb $4, %al
    outb %al, $0x40
    movl $0xfee00000, %edi
    movl $0x1ff, 0xf0(%rdi)
    movl $0x700, 0x350(%rdi)
    xorl %ebx, %ebx
1:  sti
    hlt
    cli
    cmpl $3, %ebx
    jb 1b

    movl $10000000, %ecx
2:  decl %ecx
    jnz 2b

    # QEMU exits with (0x10 << 1) | 1 = 33.
    movl $0x10, %eax
    movw $EXIT_PORT, %dx
    outl %eax, %dx
3:  hlt
    jmp 3b

gate:
    movw %ax, (%rdi)
    movw $24, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    movw $(ROM >> 16), 6(%rdi)
    ret

page_fault:
    movl $0x200083, 0x3008
    addq $8, %rsp
    iretq

timer:
    incl %ebx
    pushq %rax
    movb $0x20, %al
    outb %al, $0x20
    popq %rax
    iretq

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00af9b000000ffff
gdt_pointer:
    .word 31
    .long gdt - _start + ROM
idt_pointer:
    .word 0xfff
    .quad 0x8000

    .org 0xfff0
    .code16
    jmp _start
    .org 0x10000
