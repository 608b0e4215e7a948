//! Ids that cannot be mistaken for one another, and their names in the API.

use std::fmt;

/// The longest id of a node, a domain and so on, in bytes.
pub const ID_BYTES_MAX: usize = 63;

/// What such an id may be, for people.
pub const ID_SYNTAX: &str =
    "1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit";

/// A name or id that is none of its kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {expected}")]
pub struct BadId {
    /// What was given.
    pub value: String,
    /// What is accepted.
    pub expected: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $collection:literal, $syntax:expr, $check:path) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Reads a bare id.
            ///
            /// # Errors
            /// It breaks the syntax.
            pub fn parse(id: &str) -> Result<Self, BadId> {
                if $check(id) {
                    Ok(Self(id.to_owned()))
                } else {
                    let expected = format!("an id: {}", $syntax);
                    Err(BadId { value: id.to_owned(), expected })
                }
            }

            /// Reads a name of the API, with the collection's prefix.
            ///
            /// # Errors
            /// Another collection's name, or an id that breaks the syntax.
            pub fn from_name(name: &str) -> Result<Self, BadId> {
                match name.strip_prefix(concat!($collection, "/")) {
                    Some(id) if $check(id) => Ok(Self(id.to_owned())),
                    _ => Err(BadId {
                        value: name.to_owned(),
                        expected: format!(
                            concat!("of the form ", $collection, "/{{id}} (id: {})"), $syntax
                        ),
                    }),
                }
            }

            /// Takes an id from a row of ours, where it was checked before it was written.
            #[must_use]
            pub fn trusted(id: &str) -> Self {
                Self(id.to_owned())
            }

            /// The bare id.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The name in the API.
            #[must_use]
            pub fn name(&self) -> String {
                format!(concat!($collection, "/{}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A host, as its agent calls itself.
    NodeId, "nodes", ID_SYNTAX, is_label
);
id!(
    /// A virtual machine, as its owner calls it. Its `uid` is what is never used again.
    DomainId, "domains", ID_SYNTAX, is_label
);
id!(
    /// A block device of a domain.
    VolumeId, "volumes", ID_SYNTAX, is_label
);
id!(
    /// An immutable source of volumes.
    ImageId, "images", ID_SYNTAX, is_label
);
id!(
    /// What a domain's disks held at one moment.
    SnapshotId, "snapshots", ID_SYNTAX, is_label
);
id!(
    /// Where domains get their addresses from.
    NetworkId, "networks", ID_SYNTAX, is_label
);
id!(
    /// A long-running operation: a uuid that the controller makes.
    OperationId, "operations", UUID_SYNTAX, is_uuid
);

const UUID_SYNTAX: &str = "a UUID such as 0b0f4f0e-7c52-4a19-9f3e-0d6d3c8f5a11";

impl OperationId {
    /// A new one.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }
}

fn is_label(id: &str) -> bool {
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    (1..=ID_BYTES_MAX).contains(&id.len())
        && id.bytes().all(|b| inner(&b))
        && !id.starts_with('-')
        && !id.ends_with('-')
}

/// The canonical form only, so that one operation has one name.
fn is_uuid(id: &str) -> bool {
    uuid::Uuid::try_parse(id).is_ok_and(|uuid| uuid.as_hyphenated().to_string() == id)
}

/// Whether it is a UUID in its canonical form, as request ids must be.
#[must_use]
pub fn is_request_id(id: &str) -> bool {
    is_uuid(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What people get wrong: slashes, capitals, the wrong collection, the bare id.
    #[test]
    fn names_of_another_kind_are_refused_with_what_is_accepted() {
        assert_eq!(DomainId::from_name("domains/web-1").unwrap().as_str(), "web-1");
        for bad in ["web-1", "domains/", "domains/a/b", "domains/Web", "nodes/web-1", "domains/-a"]
        {
            let error = DomainId::from_name(bad).unwrap_err();
            assert!(error.to_string().contains("domains/{id}"), "{error}");
            assert!(error.to_string().contains(bad), "{error}");
        }
        let error = OperationId::from_name("operations/web-1").unwrap_err();
        assert!(error.to_string().contains("UUID"), "{error}");
        assert!(NodeId::parse(&"a".repeat(63)).is_ok());
        assert!(NodeId::parse(&"a".repeat(64)).is_err());
    }
}
