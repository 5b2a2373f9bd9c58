//! The Intel MultiProcessor table (specification 1.4): tells a guest without ACPI of its CPUs and interrupts.
//!
//! It lies at 0xf0000, where the specification has a guest look for it and where the memory map shows no
//! memory. ISA interrupt n is IOAPIC pin n, as KVM wires them.

/// Where the table goes.
pub(crate) const ADDRESS: u64 = 0xf_0000;

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const ISA_IRQS: u8 = 16;
const ALL_LAPICS: u8 = 0xff;

/// Entry types.
const CPU: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// The bytes to write at [`ADDRESS`] for a machine with `cpus` (at most 240) vCPUs.
pub(crate) fn table(cpus: u8) -> Vec<u8> {
    let ioapic_id = cpus;
    let mut entries = Vec::new();
    for id in 0..cpus {
        let flags = 1 | u8::from(id == 0) << 1; // enabled, boot processor
        entries.extend([CPU, id, APIC_VERSION, flags]);
        entries.extend(0x600u32.to_le_bytes()); // family 6
        entries.extend(0x201u32.to_le_bytes()); // FPU, APIC
        entries.extend([0; 8]);
    }
    entries.extend([BUS, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([IO_APIC, ioapic_id, APIC_VERSION, 1]);
    entries.extend(IOAPIC.to_le_bytes());
    for irq in 0..ISA_IRQS {
        entries.extend([IO_INTERRUPT, INT, 0, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    entries.extend([LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.extend([LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_LAPICS, 1]);
    let count = u16::from(cpus) + 1 + 1 + u16::from(ISA_IRQS) + 2;

    let mut header = Vec::new();
    header.extend(b"PCMP");
    let length = u16::try_from(44 + entries.len()).unwrap_or(u16::MAX);
    header.extend(length.to_le_bytes());
    header.extend([4, 0]); // version 1.4, checksum to come
    header.extend(b"FERRY   REFVMM      ");
    header.extend([0; 6]); // no OEM table
    header.extend(count.to_le_bytes());
    header.extend(LAPIC.to_le_bytes());
    header.extend([0; 4]);
    header[7] = checksum(header.iter().chain(&entries));

    // The floating pointer, 16 bytes, in front of the table that it points to.
    let mut pointer = Vec::new();
    pointer.extend(b"_MP_");
    pointer.extend((0xf_0000u32 + 16).to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    [pointer, header, entries].concat()
}

fn checksum<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u8 {
    bytes.into_iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_zero_and_the_length_is_true() {
        for cpus in [1, 2, 240] {
            let bytes = table(cpus);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(pointer.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            assert_eq!(table.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!(length, table.len());
            assert_eq!(44 + usize::from(cpus) * 20 + 8 + 8 + 16 * 8 + 2 * 8, length);
        }
    }

    #[test]
    fn the_interrupts_of_console_and_balloon_are_pins_of_the_ioapic() {
        let bytes = table(2);
        for irq in [4, 5] {
            let entry = [IO_INTERRUPT, INT, 0, 0, ISA_BUS, irq, 2, irq];
            assert!(bytes.windows(8).any(|w| w == entry), "{irq}");
        }
    }
}
