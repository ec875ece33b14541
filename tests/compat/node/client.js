// A client in Node that is made of the proto files alone: nothing of it was generated ahead or written by hand.
//
//   node client.js TARGET PROTO_DIR [KEY]
//
// It appends two messages with a call identity, sends the very same call again, reads the bytes back, lists, asks for a
// session that does not exist, and prints what it saw as one JSON object.
'use strict';

const crypto = require('node:crypto');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const TIMEOUT_MS = 10_000;

// 64-bit numbers as strings: JavaScript's numbers are doubles, which end at 2**53.
const OPTIONS = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };

function connect(target, protoDir) {
  const definition = protoLoader.loadSync('sessionstore/v1/session_store.proto', { ...OPTIONS, includeDirs: [protoDir] });
  const { SessionStore } = grpc.loadPackageDefinition(definition).sessionstore.v1;
  return new SessionStore(target, grpc.credentials.createInsecure());
}

function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, { deadline: Date.now() + TIMEOUT_MS }, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

// A stream of blocks, as one buffer.
async function readAll(client, key) {
  const blocks = [];
  const stream = client.ReadMessages({ key }, { deadline: Date.now() + TIMEOUT_MS });
  for await (const reply of stream) blocks.push(reply.messages);
  return Buffer.concat(blocks);
}

// All heads whose key begins with the prefix, page by page.
async function list(client, prefix) {
  const heads = [];
  let pageToken = '';
  do {
    const page = await call(client, 'ListSessions', { prefix, page_size: 1, page_token: pageToken });
    heads.push(...page.sessions);
    pageToken = page.next_page_token;
  } while (pageToken);
  return heads;
}

async function codeOf(promise) {
  try {
    await promise;
    return 'OK';
  } catch (error) {
    return grpc.status[error.code];
  }
}

async function main(target, protoDir, key = 'node:1') {
  const client = connect(target, protoDir);
  try {
    const info = await call(client, 'GetServerInfo', {});
    // Messages travel as JSONL: one object per line, each line ended by \n. The bytes are stored as they are.
    const messages = Buffer.from('{"role":"user","content":"привет 🚀"}\n{"n": 9007199254740993, "f": 1.10}\n');
    // Whoever may have to send a call again gives it an identity, and sends the same one with the same content.
    const append = { key, messages, call: { client_id: crypto.randomUUID(), sequence: 1, answered_through: 0 } };
    const first = await call(client, 'AppendMessages', append);
    const again = await call(client, 'AppendMessages', append);
    await call(client, 'AppendMessages', { key: `${key}/other`, messages: Buffer.from('{"role":"user"}\n') });
    const got = await call(client, 'GetSession', { key });
    return {
      engine: info.engine,
      first,
      again,
      sent: messages.toString('base64'),
      got: got.messages.toString('base64'),
      streamed: (await readAll(client, key)).toString('base64'),
      message_count: got.session.message_count,
      listed: (await list(client, key)).map((head) => head.key),
      missing: await codeOf(call(client, 'GetSession', { key: `${key}/missing` })),
    };
  } finally {
    client.close();
  }
}

if (process.argv.length < 4) {
  console.error('usage: node client.js TARGET PROTO_DIR [KEY]');
  process.exitCode = 2;
} else {
  main(...process.argv.slice(2)).then(
    (result) => console.log(JSON.stringify(result)),
    (error) => {
      console.error(String(error));
      process.exitCode = 1;
    },
  );
}
