//! What a boot processor's registers hold at the guest's first instruction.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// Where the boot GDT lies.
pub(crate) const GDT: u64 = 0x500;
/// Where an empty IDT lies.
const IDT: u64 = 0x520;
/// The first of the page tables of a 64-bit entry.
pub(crate) const PAGE_TABLES: u64 = 0x9000;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// How the kernel wants to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// PVH: 32-bit protected mode without paging, EBX → `hvm_start_info`.
    Pvh {
        /// First instruction.
        rip: u64,
        /// Guest-physical address of `hvm_start_info`.
        start_info: u64,
    },
    /// Linux 64-bit boot protocol: long mode, identity mapped, RSI → `boot_params`.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Guest-physical address of `boot_params`.
        zero_page: u64,
    },
}

impl Entry {
    /// General registers.
    pub(crate) fn regs(self) -> kvm_regs {
        let blank = kvm_regs { rflags: 2, ..Default::default() };
        match self {
            Self::Pvh { rip, start_info } => kvm_regs { rip, rbx: start_info, ..blank },
            Self::Linux64 { rip, zero_page } => {
                kvm_regs { rip, rsi: zero_page, rsp: 0x8ff0, rbp: 0x8ff0, ..blank }
            }
        }
    }

    /// Segment and control registers, changed in place from the reset state.
    pub(crate) fn set_sregs(self, sregs: &mut kvm_sregs) {
        let gdt = self.gdt();
        let [_, code, data, tss] = gdt.map(Descriptor);
        sregs.cs = code.segment(1);
        for s in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *s = data.segment(2);
        }
        sregs.tr = tss.segment(3);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 4 * 8 - 1;
        sregs.idt.base = IDT;
        sregs.idt.limit = 7;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        if matches!(self, Self::Linux64 { .. }) {
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
    }

    /// The boot GDT: null, code, data, TSS.
    pub(crate) fn gdt(self) -> [u64; 4] {
        match self {
            Self::Pvh { .. } => {
                [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
            }
            Self::Linux64 { .. } => {
                [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff]
            }
        }
    }
}

/// A segment descriptor as it lies in a GDT (Intel SDM vol. 3A, 3.4.5).
#[derive(Clone, Copy)]
struct Descriptor(u64);

impl Descriptor {
    fn bits(self, from: u32, count: u32) -> u8 {
        u8::try_from(self.0 >> from & ((1 << count) - 1)).unwrap_or(0)
    }

    fn segment(self, index: u16) -> kvm_segment {
        let d = self.0;
        let base = (d >> 16 & 0xff_ffff) | (d >> 56 << 24);
        let raw_limit = u32::try_from((d & 0xffff) | (d >> 32 & 0xf_0000)).unwrap_or(0);
        let pages = self.bits(55, 1);
        let present = self.bits(47, 1);
        kvm_segment {
            base,
            limit: if pages == 1 { raw_limit << 12 | 0xfff } else { raw_limit },
            selector: index * 8,
            type_: self.bits(40, 4),
            present,
            dpl: self.bits(45, 2),
            db: self.bits(54, 1),
            s: self.bits(44, 1),
            l: self.bits(53, 1),
            g: pages,
            avl: self.bits(52, 1),
            unusable: 1 - present,
            padding: 0,
        }
    }
}

/// Identity page tables for the first 4 GiB by 2 MiB pages: (address, entries) of each table.
pub(crate) fn identity_map() -> Vec<(u64, Vec<u64>)> {
    const TABLE: u64 = 3; // present, writable
    const LARGE: u64 = 0x83;
    let (pml4, pdpt, first_pd) = (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    let mut tables = vec![(pml4, vec![pdpt | TABLE])];
    tables.push((pdpt, (0..4).map(|i| (first_pd + i * 0x1000) | TABLE).collect()));
    for gib in 0..4u64 {
        tables.push((
            first_pd + gib * 0x1000,
            (0..512).map(|i| (gib << 30) | (i << 21) | LARGE).collect(),
        ));
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pvh_enters_flat_32_bit_code_without_paging() {
        let entry = Entry::Pvh { rip: 0x10_0000, start_info: 0x6000 };
        let mut s = kvm_sregs::default();
        entry.set_sregs(&mut s);
        assert_eq!(
            (s.cs.base, s.cs.limit, s.cs.db, s.cs.l, s.cs.type_),
            (0, 0xffff_ffff, 1, 0, 0xb)
        );
        assert_eq!((s.ds.type_, s.ds.limit, s.ds.selector), (3, 0xffff_ffff, 0x10));
        assert_eq!((s.tr.type_, s.tr.limit, s.tr.s), (0xb, 0x67, 0));
        assert_eq!((s.cr0, s.cr4, s.efer), (0x11, 0, 0));
        assert_eq!(entry.regs().rbx, 0x6000);
    }

    #[test]
    fn linux64_enters_long_mode() {
        let mut s = kvm_sregs::default();
        Entry::Linux64 { rip: 0, zero_page: 0x7000 }.set_sregs(&mut s);
        assert_eq!((s.cs.l, s.cs.db), (1, 0));
        assert_eq!(s.efer, 0x500);
        assert_eq!(s.cr3, PAGE_TABLES);
        let tables = identity_map();
        assert_eq!(tables[2].1[1], 0x20_0083);
        assert_eq!(tables[5].1[511], 0xffe0_0083);
    }
}
