//! Guests of a few instructions, as files.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};

use ferry_pages::Run;
use ferry_refvmm::{DirtyLog, MachineConfig, SerialSink};

/// Where the ELF guests are loaded.
pub(crate) const LOAD: u64 = 0x10_0000;
/// The page that [`COUNTER`] counts in.
pub(crate) const COUNTER_FRAME: u64 = 0x200;

/// Counts in EBP and at 0x20_0000; prints `abc…p` over and over, and `!` for ever if the two differ.
pub(crate) const COUNTER: &[u8] = &[
    0x31, 0xed, //                         xor ebp, ebp
    0xba, 0xf8, 0x03, 0x00, 0x00, //       mov edx, 0x3f8
    0x45, //                         next: inc ebp
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // inc dword [0x200000]
    0x3b, 0x2d, 0x00, 0x00, 0x20, 0x00, // cmp ebp, [0x200000]
    0x75, 0x11, //                         jne bad
    0x89, 0xe8, //                         mov eax, ebp
    0x24, 0x0f, //                         and al, 15
    0x04, 0x61, //                         add al, 'a'
    0xee, //                               out dx, al
    0xb9, 0x64, 0x00, 0x00, 0x00, //       mov ecx, 100
    0x49, //                         wait: dec ecx
    0x75, 0xfd, //                         jnz wait
    0xeb, 0xe0, //                         jmp next
    0xb0, 0x21, //                    bad: mov al, '!'
    0xee, //                               out dx, al
    0xeb, 0xfd, //                         jmp bad + 2
];

/// Resets the machine by the keyboard controller.
pub(crate) const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];

/// An invalid instruction without an IDT: a triple fault.
pub(crate) const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];

/// Prints what it reads at an unknown port and an unknown address, then what port 0x64 says, then `.`.
pub(crate) const PROBE: &[u8] = &[
    0xba, 0x34, 0x12, 0x00, 0x00, 0xec, //  mov edx, 0x1234; in al, dx
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xee, //  mov edx, 0x3f8; out dx, al
    0xa0, 0x00, 0x00, 0x00, 0xd1, 0xee, //  mov al, [0xd1000000]; out dx, al
    0xe4, 0x64, 0xee, //                    in al, 0x64; out dx, al
    0xb0, 0x2e, 0xee, 0xeb, 0xfe, //        mov al, '.'; out dx, al; jmp $
];

/// Prints the first register of the balloon, byte by byte.
pub(crate) const MAGIC: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, //        mov edx, 0x3f8
    0xa1, 0x00, 0x00, 0x00, 0xd0, //        mov eax, [0xd0000000]
    0xee, 0xc1, 0xe8, 0x08, //              out dx, al; shr eax, 8
    0xee, 0xc1, 0xe8, 0x08, //              out dx, al; shr eax, 8
    0xee, 0xc1, 0xe8, 0x08, //              out dx, al; shr eax, 8
    0xee, 0xeb, 0xfe, //                    out dx, al; jmp $
];

/// Prints ECX of CPUID's leaf 0x80000001, byte by byte, then `.` over and over.
pub(crate) const FEATURES: &[u8] = &[
    0xb8, 0x01, 0x00, 0x00, 0x80, 0x0f, 0xa2, // mov eax, 0x80000001; cpuid
    0xba, 0xf8, 0x03, 0x00, 0x00, 0x89, 0xc8, // mov edx, 0x3f8; mov eax, ecx
    0xee, 0xc1, 0xe8, 0x08, //                   out dx, al; shr eax, 8
    0xee, 0xc1, 0xe8, 0x08, //                   out dx, al; shr eax, 8
    0xee, 0xc1, 0xe8, 0x08, 0xee, //             out dx, al; shr eax, 8; out dx, al
    0xb0, 0x2e, 0xee, 0xeb, 0xfd, //             mov al, '.'; out dx, al; jmp $ - 1
];

/// Echoes what is typed, plus one.
pub(crate) const ECHO: &[u8] = &[
    0xba, 0xfd, 0x03, 0x00, 0x00, //  wait: mov edx, 0x3fd
    0xec, 0xa8, 0x01, 0x74, 0xf6, //        in al, dx; test al, 1; jz wait
    0xba, 0xf8, 0x03, 0x00, 0x00, //        mov edx, 0x3f8
    0xec, 0xfe, 0xc0, 0xee, 0xeb, 0xeb, //  in al, dx; inc al; out dx, al; jmp wait
];

/// Writes a word to each of [`SWEPT`]'s pages, then prints `.`. It leaves the guest for each page, since a KVM that
/// emulates ring 0 looks for a full ring only then.
pub(crate) const SWEEP: &[u8] = &[
    0xbf, 0x00, 0x00, 0x00, 0x01, //        mov edi, 16 MiB
    0xff, 0x07, //                    next: inc dword [edi]
    0xe6, 0x80, //                          out 0x80, al
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, //  add edi, 4096
    0x81, 0xff, 0x00, 0x00, 0x00, 0x07, //  cmp edi, 112 MiB
    0x72, 0xee, //                          jb next
    0xba, 0xf8, 0x03, 0x00, 0x00, //        mov edx, 0x3f8
    0xb0, 0x2e, 0xee, 0xeb, 0xfe, //        mov al, '.'; out dx, al; jmp $
];
/// What [`SWEEP`] writes: more pages than a dirty ring has entries.
pub(crate) const SWEPT: Run = Run::new(0x1000, 0x6000);

/// An ELF64 with `code` at [`LOAD`], `memory_bytes` of memory there, and notes that hold a PVH entry in the
/// first of two note segments.
pub(crate) fn elf(code: &[u8], memory_bytes: u64) -> Vec<u8> {
    let mut pvh = Vec::new();
    for word in [4u32, 4, 18] {
        pvh.extend(word.to_le_bytes());
    }
    pvh.extend(b"Xen\0");
    pvh.extend(u32::try_from(LOAD).unwrap().to_le_bytes());
    let mut other = Vec::new();
    for word in [4u32, 4, 3] {
        other.extend(word.to_le_bytes());
    }
    other.extend(b"GNU\0abcd");

    let headers = 64 + 3 * 56;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for word in [LOAD, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 3, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let (pvh_bytes, other_bytes, code_bytes) =
        (pvh.len() as u64, other.len() as u64, code.len() as u64);
    let segments = [
        (4u32, headers, 0, pvh_bytes, pvh_bytes),
        (4, headers + pvh_bytes, 0, other_bytes, other_bytes),
        (1, headers + pvh_bytes + other_bytes, LOAD, code_bytes, memory_bytes.max(code_bytes)),
    ];
    for (kind, offset, address, in_file, in_memory) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [offset, address, address, in_file, in_memory, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    [file, pvh, other, code.to_vec()].concat()
}

/// A bzImage whose 64-bit entry prints `64`, then the number of memory map entries as a digit.
pub(crate) fn bzimage() -> Vec<u8> {
    const CODE: &[u8] = &[
        0x66, 0xba, 0xf8, 0x03, //                   mov dx, 0x3f8
        0xb0, 0x36, 0xee, 0xb0, 0x34, 0xee, //       '6', '4'
        0x8a, 0x86, 0xe8, 0x01, 0x00, 0x00, //       mov al, [rsi + 0x1e8]
        0x04, 0x30, 0xee, 0xeb, 0xfe, //             add al, '0'; out dx, al; jmp $
    ];
    let mut file = vec![0u8; 1024];
    file[0x1f1] = 1; // setup sectors
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x211] = 1; // loaded high
    file[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236] = 1; // 64-bit entry
    file[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes()); // init_size
    file.resize(1024 + 0x200, 0x90);
    file.extend(CODE);
    file
}

/// A machine of 8 MiB whose kernel is `file`, printing to `DIR/serial`.
pub(crate) fn config(dir: &Path, file: &[u8]) -> MachineConfig {
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, file).unwrap();
    MachineConfig {
        name: "tiny".into(),
        memory_bytes: 8 << 20,
        huge_pages: false,
        cpus: 1,
        cpu: None,
        kernel,
        initrd: None,
        cmdline: "hello".into(),
        dirty_log: DirtyLog::Auto,
        serial: SerialSink::File(serial(dir)),
    }
}

/// Where the machine's console goes.
pub(crate) fn serial(dir: &Path) -> PathBuf {
    dir.join("serial")
}

/// What the machine printed so far.
pub(crate) fn printed(dir: &Path) -> Vec<u8> {
    std::fs::read(serial(dir)).unwrap_or_default()
}

/// Waits (10 s at most) until `condition`.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(begun.elapsed().as_secs() < 10, "{what} did not happen");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Whether there is KVM; prints SKIP if not.
pub(crate) fn kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("SKIP: no /dev/kvm that can be opened");
    }
    there
}

/// Asserts that `text` is what [`COUNTER`] prints when it never misses or repeats a step.
pub(crate) fn assert_unbroken(text: &[u8]) {
    for (i, pair) in text.windows(2).enumerate() {
        let next = if pair[0] == b'p' { b'a' } else { pair[0] + 1 };
        assert_eq!(pair[1], next, "after {} of {} characters", i + 1, text.len());
    }
}
