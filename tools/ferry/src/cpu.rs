//! `ferry cpu`: what hosts can show guests of their processors, as files that are compared.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ferry_refvmm::{Cpu, RefHost};
use serde::Deserialize;

use crate::Failure;
use crate::args;
use crate::protocol::{Reply, Request};
use crate::runtime_dir::{RuntimeDir, RuntimeError};
use crate::vm;

/// No description is larger.
const MAX_BYTES: u64 = 1 << 20;

pub(crate) fn main(
    runtime: impl FnOnce() -> Result<RuntimeDir, RuntimeError>,
    command: &args::Cpu,
) -> Result<(), Failure> {
    let cpu = match command {
        args::Cpu::Show { of: None } => RefHost::cpu()?,
        args::Cpu::Show { of: Some(name) } => match vm::exchange(&runtime()?, name, &Request::Cpu)?
        {
            Reply::Cpu(cpu) => *cpu,
            other => return Err(vm::unexpected(&other)),
        },
        args::Cpu::Baseline { files } => {
            let read = |file: &PathBuf| Ok((file.display().to_string(), read(file)?));
            let hosts = files.iter().map(read).collect::<Result<Vec<_>, Failure>>()?;
            let baseline = Cpu::baseline(&hosts)?;
            for (file, host) in &hosts {
                let without: Vec<_> =
                    host.features.difference(&baseline.features).cloned().collect();
                if !without.is_empty() {
                    eprintln!("ferry: left out, of {file}: {}", without.join(" "));
                }
            }
            baseline
        }
    };
    println!("{}", serde_json::to_string_pretty(&cpu)?);
    Ok(())
}

/// What `ferry cpu` printed to `path`.
pub(crate) fn read(path: &Path) -> Result<Cpu, Failure> {
    let named = |why: String| Failure::words(format!("{}: {why}", path.display()));
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut text))
        .map_err(|e| named(format!("cannot read it: {e}")))?;
    parse(&text).map_err(named)
}

fn parse(text: &[u8]) -> Result<Cpu, String> {
    const NONE: &str = "not a processor as `ferry cpu show` prints it";
    /// Of any version.
    #[derive(Deserialize)]
    struct Any {
        ferry_cpu: u32,
    }
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("{NONE}: more than {MAX_BYTES} bytes"));
    }
    let any: Any = serde_json::from_slice(text).map_err(|e| format!("{NONE}: {e}"))?;
    if any.ferry_cpu != Cpu::VERSION {
        return Err(format!(
            "a processor in version {}; this ferry reads version {}. Make it anew with `ferry cpu`, or use a ferry that \
             reads it",
            any.ferry_cpu,
            Cpu::VERSION
        ));
    }
    let cpu: Cpu = serde_json::from_slice(text).map_err(|e| format!("{NONE}: {e}"))?;
    cpu.check().map_err(|e| format!("{NONE}: {e}"))?;
    Ok(cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{
  "ferry_cpu": 1,
  "vendor": "AuthenticAMD",
  "family": 25,
  "model": 17,
  "stepping": 1,
  "features": ["avx", "avx2"],
  "limits": {
    "level": 16, "level-func7": 1, "xlevel": 2147483681,
    "phys-bits": 48, "virtual-bits": 48, "avx10-version": 0
  },
  "xsave": {"2": {"bytes": 256, "offset": 576, "flags": 0}},
  "tsc_khz": 2600000,
  "tsc_scaling": false
}"#;

    #[test]
    fn what_is_printed_is_read_as_it_was() {
        let cpu = parse(GOOD.as_bytes()).unwrap();
        assert_eq!((cpu.model, cpu.limits.level_func7, cpu.xsave[&2].offset), (17, 1, 576));
        let again = serde_json::to_vec_pretty(&cpu).unwrap();
        assert_eq!(parse(&again), Ok(cpu));
    }

    #[test]
    fn a_file_that_is_none_is_an_error_with_place_and_reason() {
        let with = |from: &str, to: &str| {
            assert!(GOOD.contains(from), "{from}");
            GOOD.replace(from, to)
        };
        let cases = [
            (String::new(), "EOF while parsing a value at line 1 column 0"),
            ("avx avx2".into(), "line 1 column 1"),
            ("[]".into(), "line 1 column 2"),
            ("{\"vendor\": \"AuthenticAMD\"}".into(), "missing field `ferry_cpu` at line 1"),
            (with("\"ferry_cpu\": 1", "\"ferry_cpu\": 2"), "version 2; this ferry reads version 1"),
            (with(": 25,", ": \"25\","), "expected u32 at line 4 column 16"),
            (with(": 25,", ": -1,"), "at line 4 column 14"),
            (with("\"model\": 17,", ""), "missing field `model`"),
            (with("\"vendor\"", "\"seller\""), "unknown field `seller`, expected"),
            (with("\"phys-bits\": 48", "\"phys-bits\": 480"), "limits.phys-bits is 480"),
            (with("\"level\": 16, ", ""), "missing field `level` at line 11"),
            (with("\"2\"", "\"two\""), "line 12"),
            (with("\"2\"", "\"64\""), "the last number in xsave is 64"),
            (with("AuthenticAMD", "AMD"), "vendor is `AMD`"),
            (with("2600000", "0"), "tsc_khz is 0"),
            (GOOD.replace('}', ""), "EOF"),
        ];
        for (text, said) in cases {
            let e = parse(text.as_bytes()).unwrap_err();
            assert!(e.contains(said), "{said}: {e}");
        }
        let large = vec![b' '; 1 << 21];
        assert!(parse(&large).unwrap_err().contains("more than 1048576 bytes"));
    }

    #[test]
    fn damage_anywhere_is_an_error_or_a_processor_and_never_a_panic() {
        for end in 0..GOOD.len() {
            assert!(parse(&GOOD.as_bytes()[..end]).is_err(), "cut at {end}");
            for flip in [1, 0x20, 0x80, 0xff] {
                let mut bytes = GOOD.as_bytes().to_vec();
                bytes[end] ^= flip;
                if let Ok(cpu) = parse(&bytes) {
                    let _ = (cpu.lacks(&cpu), Cpu::baseline(&[("a".into(), cpu)]));
                }
            }
        }
    }
}
