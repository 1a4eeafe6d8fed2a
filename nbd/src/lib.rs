//! NBD protocol: asynchronous client, read-only server, shared wire types.
