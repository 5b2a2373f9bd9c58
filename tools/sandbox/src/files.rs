//! What can be opened: rules of landlock (Documentation/userspace-api/landlock.rst).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::{ConfineError, Needs};

/// The newest that is asked for; an older kernel gives what it has.
const NEWEST: ABI = ABI::V9;

/// Whether the kernel holds files to the rules.
pub(crate) fn restrict(needs: &Needs) -> Result<bool, ConfineError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let update = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let write = read
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir;
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        // There is no rule for these: TCP is spoken on sockets that are there before.
        .handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp)?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (paths, access) in [(&needs.read, read), (&needs.update, update), (&needs.write, write)] {
        for path in paths {
            ruleset = ruleset.add_rule(rule(path, access)?)?;
        }
    }
    Ok(ruleset.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

fn rule(path: &Path, access: BitFlags<AccessFs>) -> Result<PathBeneath<PathFd>, ConfineError> {
    let opened = PathFd::new(path).map_err(|e| ConfineError::Path {
        path: path.to_owned(),
        source: std::io::Error::other(e.to_string()),
    })?;
    let possible = if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
    Ok(PathBeneath::new(opened, possible))
}
