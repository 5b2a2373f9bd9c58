//! Kernel files: which kind, where they want to lie, and loading them.
//!
//! ELF is read here rather than by `linux-loader`, which takes the last `PT_NOTE` for the only one and
//! cannot say how much memory a kernel needs.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Bytes, GuestAddress};

use crate::VmmError;
use crate::memory::{self, GuestRam};

/// Below this lie the tables that refvmm writes for the guest.
pub(crate) const LOWEST_LOAD: u64 = 1 << 20;
const MAX_SEGMENTS: usize = 256;
const MAX_NOTES_BYTES: u64 = 1 << 20;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const SETUP_HEADER: u64 = 0x1f1;
const HDRS: u32 = 0x5372_6448;
const XLF_KERNEL_64: u16 = 1;

/// A kernel in guest memory.
pub(crate) enum Loaded {
    /// Enter by PVH at this address.
    Pvh { entry: u64, end: u64 },
    /// Enter by the 64-bit Linux protocol, with this header in the zero page.
    BzImage { entry: u64, end: u64, header: Box<setup_header> },
}

impl Loaded {
    /// The first address that the kernel does not use.
    pub(crate) fn end(&self) -> u64 {
        match self {
            Self::Pvh { end, .. } | Self::BzImage { end, .. } => *end,
        }
    }

    /// The initrd must end at or below this.
    pub(crate) fn initrd_limit(&self) -> u64 {
        match self {
            Self::Pvh { .. } => memory::HOLE_START,
            Self::BzImage { header, .. } => u64::from(header.initrd_addr_max) + 1,
        }
    }
}

/// Loads the kernel file at `path`.
pub(crate) fn load(ram: &GuestRam, memory_bytes: u64, path: &Path) -> Result<Loaded, VmmError> {
    let file_error =
        |action, source| VmmError::File { action, what: "kernel", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(|e| file_error("open", e))?;
    if file.metadata().map_err(|e| file_error("read", e))?.is_dir() {
        return Err(file_error("read", std::io::ErrorKind::IsADirectory.into()));
    }
    let mut head = Vec::new();
    Read::by_ref(&mut file)
        .take(0x300)
        .read_to_end(&mut head)
        .map_err(|e| file_error("read", e))?;
    let kernel = Kernel { path, file, memory_bytes };
    if head.starts_with(b"\x7fELF") {
        kernel.load_elf(ram, &head)
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        kernel.load_bzimage(ram, &head)
    } else if head.is_empty() {
        Err(kernel.not_one("the file is empty"))
    } else {
        let start: Vec<String> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
        let packed = match head.as_slice() {
            [0x1f, 0x8b, ..] => " (gzip: unpack it first)",
            [0xfd, b'7', b'z', ..] => " (xz: unpack it first)",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => " (zstd: unpack it first)",
            _ => "",
        };
        Err(kernel.not_one(format!("it begins with {}{packed}", start.join(" "))))
    }
}

struct Kernel<'a> {
    path: &'a Path,
    file: File,
    memory_bytes: u64,
}

/// One stretch of an ELF that is loaded.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl Kernel<'_> {
    fn not_one(&self, why: impl Into<String>) -> VmmError {
        VmmError::NotAKernel { path: self.path.to_owned(), why: why.into() }
    }

    fn read_at(&mut self, offset: u64, bytes: u64) -> Result<Vec<u8>, VmmError> {
        let mut found = Vec::new();
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| Read::by_ref(&mut self.file).take(bytes).read_to_end(&mut found))
            .map_err(|source| VmmError::File {
                action: "read",
                what: "kernel",
                path: self.path.to_owned(),
                source,
            })?;
        if (found.len() as u64) < bytes {
            return Err(self.not_one(format!(
                "it ends within the {bytes} bytes at offset {offset:#x}: truncated?"
            )));
        }
        Ok(found)
    }

    /// Refuses `start..end` unless it is memory that the kernel may have.
    fn check_place(&self, start: u64, end: u64) -> Result<(), VmmError> {
        let low_end = self.memory_bytes.min(memory::HOLE_START);
        if start >= LOWEST_LOAD && end > low_end && low_end < memory::HOLE_START {
            return Err(VmmError::TooSmall {
                what: format!("kernel {}", self.path.display()),
                needs: end,
                has: self.memory_bytes,
            });
        }
        if start < LOWEST_LOAD || start >= end || end > low_end {
            return Err(VmmError::Placement { path: self.path.to_owned(), start, end });
        }
        Ok(())
    }

    fn load_elf(mut self, ram: &GuestRam, head: &[u8]) -> Result<Loaded, VmmError> {
        let program_headers = elf_program_headers(head).map_err(|why| self.not_one(why))?;
        let table = self.read_at(program_headers.offset, program_headers.bytes)?;
        let mut segments = Vec::new();
        let mut entry = None;
        for header in table.chunks_exact(56) {
            let kind = u32_at(header, 0);
            let segment = Segment {
                offset: u64_at(header, 8),
                address: u64_at(header, 24),
                file_bytes: u64_at(header, 32),
                memory_bytes: u64_at(header, 40),
            };
            if kind == PT_LOAD && segment.memory_bytes > 0 {
                segments.push(segment);
            } else if kind == PT_NOTE && entry.is_none() {
                let notes =
                    self.read_at(segment.offset, segment.file_bytes.min(MAX_NOTES_BYTES))?;
                entry = pvh_entry(&notes);
            }
        }
        let Some(entry) = entry else {
            return Err(
                self.not_one("it is an ELF without a PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY)")
            );
        };
        let mut end = 0;
        for s in &segments {
            if s.file_bytes > s.memory_bytes {
                return Err(self.not_one("a segment is larger in the file than in memory"));
            }
            let segment_end = s.address.saturating_add(s.memory_bytes);
            self.check_place(s.address, segment_end)?;
            end = end.max(segment_end);
        }
        if !segments
            .iter()
            .any(|s| (s.address..s.address.saturating_add(s.memory_bytes)).contains(&entry))
        {
            return Err(
                self.not_one(format!("its PVH entry {entry:#x} lies in none of its segments"))
            );
        }
        for s in segments {
            self.copy(ram, &s)?;
        }
        Ok(Loaded::Pvh { entry, end })
    }

    /// Copies a segment by pieces: a kernel with debug information is hundreds of MiB.
    fn copy(&mut self, ram: &GuestRam, s: &Segment) -> Result<(), VmmError> {
        const PIECE_BYTES: u64 = 1 << 20;
        let mut done = 0;
        while done < s.file_bytes {
            let bytes = PIECE_BYTES.min(s.file_bytes - done);
            let piece = self.read_at(s.offset.saturating_add(done), bytes)?;
            ram.write_slice(&piece, GuestAddress(s.address + done))
                .map_err(|e| VmmError::GuestMemory { what: "the kernel", why: e.to_string() })?;
            done += bytes;
        }
        Ok(())
    }

    fn load_bzimage(mut self, ram: &GuestRam, head: &[u8]) -> Result<Loaded, VmmError> {
        let at = |field: usize| head.get(field..).unwrap_or_default();
        let (version, xloadflags) = (u16_at(at(0x206), 0), u16_at(at(0x236), 0));
        if version < 0x20c || xloadflags & XLF_KERNEL_64 == 0 {
            return Err(self.not_one(format!(
                "it is a bzImage without a 64-bit entry (boot protocol {}.{})",
                version >> 8,
                version & 0xff
            )));
        }
        let start = u64::from(u32_at(at(0x214), 0));
        let init_size = u64::from(u32_at(at(0x260), 0));
        let file_bytes = self.file.seek(SeekFrom::End(0)).unwrap_or(0);
        let end = start + init_size.max(file_bytes);
        self.check_place(start, end)?;
        let loaded = BzImage::load(ram, None, &mut self.file, Some(GuestAddress(LOWEST_LOAD)))
            .map_err(|e| self.not_one(format!("it is a damaged bzImage: {e}")))?;
        let header = loaded
            .setup_header
            .filter(|h| h.header == HDRS)
            .ok_or_else(|| self.not_one(format!("it has no setup header at {SETUP_HEADER:#x}")))?;
        Ok(Loaded::BzImage {
            entry: loaded.kernel_load.0 + 0x200,
            end: end.max(loaded.kernel_end),
            header: Box::new(header),
        })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct ProgramHeaders {
    offset: u64,
    bytes: u64,
}

/// Checks an ELF header and says where the program headers are.
fn elf_program_headers(head: &[u8]) -> Result<ProgramHeaders, String> {
    if head.len() < 64 {
        return Err(format!("it is an ELF of only {} bytes", head.len()));
    }
    let (class, order, machine) = (head[4], head[5], u16_at(head, 18));
    if (class, order, machine) != (2, 1, 62) {
        return Err(format!(
            "it is an ELF, but not 64-bit little-endian x86-64 (class {class}, byte order {order}, machine {machine})"
        ));
    }
    let (offset, size, count) = (u64_at(head, 32), u16_at(head, 54), usize::from(u16_at(head, 56)));
    if size != 56 || count == 0 || count > MAX_SEGMENTS {
        return Err(format!("it is an ELF with {count} program headers of {size} bytes"));
    }
    Ok(ProgramHeaders { offset, bytes: count as u64 * 56 })
}

/// The PVH entry that a note segment names.
fn pvh_entry(notes: &[u8]) -> Option<u64> {
    let mut rest = notes;
    while rest.len() >= 12 {
        let aligned = |n: u32| usize::try_from(n).ok().and_then(|n| n.checked_next_multiple_of(4));
        let (name_bytes, content_bytes) = (aligned(u32_at(rest, 0))?, aligned(u32_at(rest, 4))?);
        let kind = u32_at(rest, 8);
        let name = rest.get(12..12usize.checked_add(name_bytes)?)?;
        let content = rest.get(12 + name_bytes..(12 + name_bytes).checked_add(content_bytes)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name.starts_with(b"Xen\0") {
            return match content.len() {
                0..4 => None,
                4..8 => Some(u64::from(u32_at(content, 0))),
                _ => Some(u64_at(content, 0)),
            };
        }
        rest = &rest[12 + name_bytes + content_bytes..];
    }
    None
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
        let len = |b: &[u8]| u32::try_from(b.len()).unwrap().to_le_bytes();
        let mut all = [len(name), len(content), kind.to_le_bytes()].concat();
        for part in [name, content] {
            all.extend(part);
            all.resize(all.len().next_multiple_of(4), 0);
        }
        all
    }

    #[test]
    fn the_pvh_entry_is_found_among_other_notes() {
        let notes =
            [note(b"GNU\0", 3, &[7; 20]), note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes())].concat();
        assert_eq!(pvh_entry(&notes), Some(0x10_0000));
        assert_eq!(pvh_entry(&note(b"Xen\0", 18, &0x10_0000u64.to_le_bytes())), Some(0x10_0000));
        assert_eq!(pvh_entry(&note(b"GNU\0", 18, &[0; 4])), None);
        for cut in 0..notes.len() {
            assert_eq!(pvh_entry(&notes[..cut]), None);
        }
        assert_eq!(pvh_entry(&[0xff; 64]), None);
    }
}
