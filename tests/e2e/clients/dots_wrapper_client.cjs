// One request by dots-wrapper: node dots_wrapper_client.cjs FOLDER ENDPOINT list|get|delete ID
"use strict";

const [folder, endpoint, act, snapshot_id] = process.argv.slice(2);
const { createApiClient } = require(require.resolve("dots-wrapper", { paths: [folder] }));
const { snapshot } = createApiClient({ token: process.env.DIGITALOCEAN_TOKEN, endpoint });
const acts = {
  list: () => snapshot.listSnapshots({}),
  get: () => snapshot.getSnapshot({ snapshot_id }),
  delete: () => snapshot.deleteSnapshot({ snapshot_id }),
};

acts[act]().then(
  ({ status, data }) => console.log(JSON.stringify({ gave: { status, data } })),
  ({ message, response }) => console.log(JSON.stringify({ threw: { message, data: response?.data } })),
);
