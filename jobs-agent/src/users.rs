//! Users of the guest's root file system: from what the host names to ids and groups, by /etc/passwd and /etc/group.

use std::fs;

use harrier_agent_protocol::User;

/// The longest passwd or group file that is looked at, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// A user as processes know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Further groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: Option<Vec<u8>>,
}

/// Finds a user.
///
/// # Errors
/// One line: there is no such name.
pub(crate) fn find(user: &User) -> Result<Account, String> {
    match user {
        User::Ids { uid, gid } => Ok(Account { uid: *uid, gid: *gid, groups: Vec::new(), home: None }),
        User::Name(name) => {
            let shown = String::from_utf8_lossy(name);
            let passwd = read("/etc/passwd")
                .map_err(|error| format!("the user {shown:?} cannot be looked up in /etc/passwd: {error}"))?;
            let account = in_passwd(&passwd, name).ok_or_else(|| {
                format!("the user {shown:?} is not in the guest's /etc/passwd: give UID:GID")
            })?;
            let groups = read("/etc/group").map(|group| groups_of(&group, name)).unwrap_or_default();
            Ok(Account { groups, ..account })
        }
    }
}

fn read(path: &str) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn number(field: Option<&[u8]>) -> Option<u32> {
    std::str::from_utf8(field?).ok()?.parse().ok()
}

fn lines(file: &[u8]) -> impl Iterator<Item = impl Iterator<Item = &[u8]>> {
    file.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b':'))
}

/// `name:password:uid:gid:comment:home:shell`, passwd(5).
fn in_passwd(passwd: &[u8], name: &[u8]) -> Option<Account> {
    lines(passwd).find_map(|mut fields| {
        if fields.next() != Some(name) {
            return None;
        }
        let (uid, gid) = (number(fields.nth(1))?, number(fields.next())?);
        let home = fields.nth(1).filter(|home| home.starts_with(b"/")).map(<[u8]>::to_vec);
        Some(Account { uid, gid, groups: Vec::new(), home })
    })
}

/// `name:password:gid:member,member`, group(5).
fn groups_of(group: &[u8], name: &[u8]) -> Vec<u32> {
    let of_line = |mut fields: Box<dyn Iterator<Item = &[u8]> + '_>| {
        let gid = number(fields.nth(2))?;
        fields.next()?.split(|byte| *byte == b',').any(|member| member == name).then_some(gid)
    };
    lines(group).filter_map(|fields| of_line(Box::new(fields))).take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\nbroken:x:one\nann:x:1000:100:,,,:/home/ann:/bin/sh\n";

    #[test]
    fn a_name_is_looked_up_with_its_groups() {
        let ann = in_passwd(PASSWD, b"ann").unwrap();
        assert_eq!((ann.uid, ann.gid, ann.home.as_deref()), (1000, 100, Some(b"/home/ann".as_slice())));
        assert_eq!(in_passwd(PASSWD, b"broken"), None);
        assert_eq!(in_passwd(PASSWD, b"an"), None);
        let group = b"users:x:100:\nvideo:x:44:bob,ann\nkvm:x:105:ann\nbad\nanna:x:7:anna\n";
        assert_eq!(groups_of(group, b"ann"), [44, 105]);
    }
}
