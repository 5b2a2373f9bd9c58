//! The swap file: without a name, private to its process, read and written past the page cache.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};

use crate::segments::{Place, SEGMENT_BYTES};

/// What direct I/O is aligned to: no disk has larger sectors.
const ALIGNED: u64 = 4096;

/// The file; its space is given back when it is closed, however the process ends.
#[derive(Debug)]
pub(crate) struct SwapFile {
    file: File,
    /// Past the page cache: else what is written stays in memory for a while.
    pub(crate) direct: bool,
}

/// A buffer that is aligned for direct I/O.
pub(crate) fn buffer() -> io::Result<MmapMut> {
    MmapMut::map_anon(SEGMENT_BYTES)
}

/// The same, for one page.
pub(crate) fn page_buffer() -> io::Result<MmapMut> {
    MmapMut::map_anon(3 * 4096)
}

impl SwapFile {
    /// A new file in directory `dir`, which nobody else can name.
    pub(crate) fn create(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = match open(dir, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => File::from(file),
            // A file system without unnamed files.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => named(dir)?,
            Err(e) => return Err(e.into()),
        };
        let direct =
            fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::DIRECT)).is_ok();
        Ok(Self { file, direct })
    }

    /// Writes `content`, of a whole segment.
    pub(crate) fn write(&self, segment: u32, content: &[u8]) -> io::Result<()> {
        self.file.write_all_at(content, u64::from(segment) * SEGMENT_BYTES as u64)
    }

    /// Reads all of `segment`.
    pub(crate) fn read_segment(&self, segment: u32, content: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(content, u64::from(segment) * SEGMENT_BYTES as u64)
    }

    /// Reads what is at `place`, by way of `buffer`.
    pub(crate) fn read<'a>(&self, place: Place, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let offset = place.offset();
        let first = offset / ALIGNED * ALIGNED;
        let end = (offset + u64::from(place.bytes)).next_multiple_of(ALIGNED);
        // A blob is no longer than a page: no more than three of them.
        let length = usize::try_from(end - first).unwrap_or(0).min(buffer.len());
        self.file.read_exact_at(&mut buffer[..length], first)?;
        let at = usize::try_from(offset - first).unwrap_or(0);
        Ok(&buffer[at..at + usize::from(place.bytes)])
    }
}

/// A file whose name is gone as soon as it is open.
fn named(dir: &Path) -> io::Result<File> {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let name = dir.join(format!(".ferry-swap-{}-{number}", std::process::id()));
    // Of a process that had this number before, and was killed just here.
    let _ = std::fs::remove_file(&name);
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&name)?;
    std::fs::remove_file(&name)?;
    Ok(file)
}
