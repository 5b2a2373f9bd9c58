# Ring 0, all of it: from the PVH entry to ring 3, and the gates back. It is short and plain on
# purpose: some hosts emulate ring 0 one instruction at a time.
#
# PVH entry (32-bit) --> page tables --> protected --> long mode --> per-vCPU TSS --> ring3_main
# SIPI (16-bit trampoline, copied to 0x90000) ----^
#
# Selectors: 0x08 code64, 0x10 data, 0x18 code32 (ring 0); 0x23 data, 0x2b code64 (ring 3);
# 0x30 + 16 * vCPU its TSS.

.section .note.pvh, "a", @note
    .balign 4
    .long 4                             # length of the name
    .long 8                             # length of the entry address
    .long 18                            # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "ax"
.code32
.global pvh_entry
pvh_entry:
    cli
    cld
    movl %ebx, start_info
    movl $0, boot_cpu
    # The first 4 GiB in 2 MiB pages, user-accessible. Ring 3 adds the rest.
    movl $(pdpt + 7), pml4
    movl $(low_directories + 7), %eax
    movl $pdpt, %edi
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $4096, %eax
    addl $8, %edi
    decl %ecx
    jnz 1b
    movl $0x87, %eax                    # large, user, writable, present
    movl $low_directories, %edi
    movl $2048, %ecx
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 2b
    lgdt gdt_pointer
    ljmp $0x18, $protected

protected:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $0x620, %eax                   # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER
    rdmsr
    orl $0x100, %eax                    # LME
    wrmsr
    movl $0x80000033, %eax              # PG, NE, ET, MP, PE; EM, TS, CD and NW clear
    movl %eax, %cr0
    ljmp $0x08, $long_mode

.code64
long_mode:
    movl boot_cpu, %eax
    movl %eax, %ecx
    shll $12, %ecx
    leaq kernel_stacks + 4096(%rcx), %rsp
    # TSS: stack of ring 0, and a bitmap that opens ports 0 to 0x3ff to ring 3.
    movl %eax, %edx
    shll $8, %edx
    addl $task_states, %edx
    movq %rsp, 4(%rdx)
    movw $104, 102(%rdx)
    movb $0xff, 232(%rdx)
    # Its descriptor.
    movl %eax, %edi
    shll $4, %edi
    movl %edi, %esi
    addl $(gdt + 0x30), %edi
    movl %edx, %ecx
    shll $16, %ecx
    orl $232, %ecx
    movl %ecx, (%rdi)
    movl %edx, %ecx
    shrl $16, %ecx
    andl $0xff, %ecx
    orl $0x8900, %ecx
    andl $0xff000000, %edx
    orl %edx, %ecx
    movl %ecx, 4(%rdi)
    addl $0x30, %esi
    ltr %si
    lidt idt_pointer
    # To ring 3, with interrupts off: they are taken only while asleep.
    movl %eax, %edi
    movl start_info, %esi
    movl %eax, %ecx
    shll $14, %ecx
    leaq user_stacks + 16384 - 8(%rcx), %rcx
    movl $0x23, %eax
    movl %eax, %ds
    movl %eax, %es
    pushq $0x23
    pushq %rcx
    pushq $2
    pushq $0x2b
    pushq $ring3_main
    iretq

# Called in ring 3: halts for %eax ticks of the LAPIC timer (16 ns each), or for good if 0. Spoils %rcx.
# An invalid opcode is the door to ring 0: `int n` and `syscall` do not get through on every host.
.global halt
halt:
    ud2
    ret

.global gate_invalid_opcode
gate_invalid_opcode:
    cmpq $halt, (%rsp)
    jne exception_6
    addq $2, (%rsp)
    testl %eax, %eax
    jz halt_for_good
    movl $0xfee00000, %ecx
    movl %eax, 0x380(%rcx)              # initial count: starts the timer
    sti
    hlt
    cli
    iretq
halt_for_good:
    cli
    hlt
    jmp halt_for_good

# The LAPIC timer, out of the hlt above.
.global gate_timer
gate_timer:
    movl $0xfee00000, %ecx
    movl $0, 0xb0(%rcx)                 # end of interrupt
    iretq

.global gate_spurious
gate_spurious:
    iretq

# Exceptions end in ring 3 as well, on a fresh stack: fault_main(vector, error, rip, address).
.macro exception vector, has_error
    .balign 16
    .if \has_error == 0
    pushq $0
    .endif
    pushq $\vector
    jmp exception_common
.endm

.balign 16
.global exception_gates
exception_gates:
.irp vector, 0,1,2,3,4,5
    exception \vector, 0
.endr
exception_6:
    exception 6, 0
    exception 7, 0
    exception 8, 1
    exception 9, 0
.irp vector, 10,11,12,13,14
    exception \vector, 1
.endr
    exception 15, 0
    exception 16, 0
    exception 17, 1
    exception 18, 0
    exception 19, 0
    exception 20, 0
    exception 21, 1
.irp vector, 22,23,24,25,26,27,28
    exception \vector, 0
.endr
    exception 29, 1
    exception 30, 1
    exception 31, 0
    .balign 16

exception_common:
    popq %rdi
    popq %rsi
    popq %rdx
    movq %cr2, %rcx
    movq %rsp, %rax
    subq $kernel_stacks, %rax
    shrq $12, %rax
    shlq $14, %rax
    addq $(user_stacks + 16384 - 8), %rax
    pushq $0x23
    pushq %rax
    pushq $2
    pushq $0x2b
    pushq $fault_main
    iretq

.code16
.global trampoline
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt - trampoline
    movl $0x11, %eax                    # ET, PE
    movl %eax, %cr0
    ljmpl $0x18, $protected
trampoline_gdt:
    .word 0x30 + 32 * 16 - 1
    .long gdt
.global trampoline_end
trampoline_end:
.code64

.section .data.tables, "aw"
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cf9b000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .skip 32 * 16
gdt_pointer:
    .word 0x30 + 32 * 16 - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
    .balign 8
start_info:
    .quad 0
.global boot_cpu
boot_cpu:
    .quad 0

.section .bss.tables, "aw", @nobits
    .balign 4096
pml4:
    .skip 4096
.global pdpt
pdpt:
    .skip 4096
low_directories:
    .skip 4 * 4096
# For memory from 4 to 64 GiB.
.global high_directories
high_directories:
    .skip 60 * 4096
.global idt
idt:
    .skip 4096
task_states:
    .skip 32 * 256
    .balign 4096
kernel_stacks:
    .skip 32 * 4096
user_stacks:
    .skip 32 * 16384
.text
