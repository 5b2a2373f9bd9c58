//! What a guest finds in memory at its first instruction.
//!
//! ```text
//! 0x0500   GDT, IDT                     0x2_0000  kernel command line
//! 0x6000   hvm_start_info, modules      0xa_0000  no memory in the map from here …
//! 0x7000   memory map / zero page       0xf_0000  MP table
//! 0x9000   page tables (bzImage)       0x10_0000  … to here; kernel above; initrd at the top below 3 GiB
//! ```

use std::fs::File;
use std::io::Read;
use std::path::Path;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::arch::mptable;
use crate::arch::registers::{self, Entry};
use crate::config::MAX_CMDLINE_BYTES;
use crate::kernel::{self, Loaded};
use crate::memory::{self, GuestRam};
use crate::{MachineConfig, VmmError, balloon};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x7000;
const ZERO_PAGE: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
const LOW_END: u64 = 0xa_0000;
const HIGH_START: u64 = kernel::LOWEST_LOAD;
const RAM: u32 = 1;
const START_MAGIC: u32 = 0x336e_c578;
const PAGE: u64 = 4096;

/// The address and length of the initrd.
#[derive(Clone, Copy)]
struct Initrd {
    at: u64,
    bytes: u64,
}

/// Writes kernel, initrd and tables to `ram`; returns how to enter.
pub(crate) fn prepare(ram: &GuestRam, config: &MachineConfig) -> Result<Entry, VmmError> {
    check_cmdline(&config.cmdline)?;
    // In front: what follows `--` is not for the kernel.
    let cmdline = format!("{}{}", balloon::CMDLINE, config.cmdline);
    let loaded = kernel::load(ram, config.memory_bytes, &config.kernel)?;
    let initrd = match &config.initrd {
        Some(path) => Some(load_initrd(ram, config.memory_bytes, &loaded, path)?),
        None => None,
    };
    let cpus = u8::try_from(config.cpus)
        .map_err(|_| VmmError::Cpus { cpus: config.cpus, max: crate::config::MAX_CPUS })?;
    put_bytes(ram, "the MP table", mptable::ADDRESS, &mptable::table(cpus))?;
    put_bytes(ram, "the command line", CMDLINE, format!("{cmdline}\0").as_bytes())?;

    let map = memory_map(config.memory_bytes);
    let entry = match loaded {
        Loaded::Pvh { entry, .. } => {
            put_start_info(ram, &map, initrd)?;
            Entry::Pvh { rip: entry, start_info: START_INFO }
        }
        Loaded::BzImage { entry, header, .. } => {
            let mut params = boot_params { hdr: *header, ..Default::default() };
            params.hdr.type_of_loader = 0xff;
            params.hdr.cmd_line_ptr = low(CMDLINE);
            params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or(0);
            if let Some(i) = initrd {
                params.hdr.ramdisk_image = low(i.at);
                params.hdr.ramdisk_size = low(i.bytes);
            }
            for (slot, &(addr, size)) in params.e820_table.iter_mut().zip(&map) {
                *slot = boot_e820_entry { addr, size, r#type: RAM };
            }
            params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
            put(ram, "the zero page", ZERO_PAGE, params)?;
            for (at, table) in registers::identity_map() {
                put_words(ram, "the page tables", at, &table)?;
            }
            Entry::Linux64 { rip: entry, zero_page: ZERO_PAGE }
        }
    };
    put_words(ram, "the GDT", registers::GDT, &entry.gdt())?;
    Ok(entry)
}

/// Start and length of usable memory.
fn memory_map(memory_bytes: u64) -> Vec<(u64, u64)> {
    let mut map = vec![(0, LOW_END)];
    for (at, bytes) in memory::stretches(memory_bytes) {
        let from = at.max(HIGH_START);
        map.push((from, at + bytes - from));
    }
    map
}

fn check_cmdline(cmdline: &str) -> Result<(), VmmError> {
    let (bytes, max, nul) = (cmdline.len(), MAX_CMDLINE_BYTES, cmdline.contains('\0'));
    if bytes > max || nul {
        return Err(VmmError::Cmdline { bytes, max, nul });
    }
    Ok(())
}

fn load_initrd(
    ram: &GuestRam,
    memory_bytes: u64,
    kernel: &Loaded,
    path: &Path,
) -> Result<Initrd, VmmError> {
    let fail =
        |action, source| VmmError::File { action, what: "initrd", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(|e| fail("open", e))?;
    let mut content = Vec::new();
    // One byte more than could ever fit is enough to know.
    let (kernel_end, low_end) =
        (kernel.end(), memory_bytes.min(memory::HOLE_START).min(kernel.initrd_limit()));
    Read::by_ref(&mut file)
        .take(low_end + 1)
        .read_to_end(&mut content)
        .map_err(|e| fail("read", e))?;
    let bytes = content.len() as u64;
    let needs = kernel_end.next_multiple_of(PAGE) + bytes.next_multiple_of(PAGE);
    if needs > low_end {
        let whole = file.metadata().map_or(bytes, |m| m.len());
        return Err(VmmError::TooSmall {
            what: format!("kernel and initrd {} ({whole} bytes)", path.display()),
            needs: kernel_end.next_multiple_of(PAGE) + whole.next_multiple_of(PAGE),
            has: memory_bytes,
        });
    }
    let at = low_end / PAGE * PAGE - bytes.next_multiple_of(PAGE);
    put_bytes(ram, "the initrd", at, &content)?;
    Ok(Initrd { at, bytes })
}

/// PVH (Xen `public/arch-x86/hvm/start_info.h`): the structure that EBX points to.
fn put_start_info(
    ram: &GuestRam,
    map: &[(u64, u64)],
    initrd: Option<Initrd>,
) -> Result<(), VmmError> {
    let mut info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    if let Some(i) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        let module = hvm_modlist_entry { paddr: i.at, size: i.bytes, ..Default::default() };
        put(ram, "the module list", MODULES, module)?;
    }
    for (at, &(addr, size)) in (MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map)
    {
        put(
            ram,
            "the memory map",
            at,
            hvm_memmap_table_entry { addr, size, type_: RAM, reserved: 0 },
        )?;
    }
    put(ram, "the start info", START_INFO, info)
}

fn put<T: ByteValued>(
    ram: &GuestRam,
    what: &'static str,
    at: u64,
    value: T,
) -> Result<(), VmmError> {
    put_bytes(ram, what, at, value.as_slice())
}

fn put_words(ram: &GuestRam, what: &'static str, at: u64, words: &[u64]) -> Result<(), VmmError> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    put_bytes(ram, what, at, &bytes)
}

fn put_bytes(ram: &GuestRam, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), VmmError> {
    ram.write_slice(bytes, GuestAddress(at)).map_err(|e| VmmError::GuestMemory {
        what,
        why: format!("{} bytes at {at:#x}: {e}", bytes.len()),
    })
}

/// An address that is below 4 GiB by construction.
fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_leaves_out_the_bios_area_and_the_hole() {
        assert_eq!(memory_map(64 << 20), [(0, 0xa_0000), (1 << 20, 63 << 20)]);
        assert_eq!(
            memory_map(5 << 30),
            [(0, 0xa_0000), (1 << 20, (3 << 30) - (1 << 20)), (4 << 30, 2 << 30)]
        );
    }

    #[test]
    fn a_command_line_that_is_too_long_or_holds_nul_is_refused() {
        check_cmdline(&"x".repeat(MAX_CMDLINE_BYTES)).unwrap();
        assert!(check_cmdline(&"x".repeat(MAX_CMDLINE_BYTES + 1)).is_err());
        assert!(check_cmdline("a\0b").unwrap_err().to_string().contains("NUL"));
    }
}
