// A table that Vue brings up to date cell by cell, so that focus and selection stay where they are.
// Roles are spelt out: on a phone the style sheet lays rows out as cards, which would take them away.
export default {
  props: { columns: Array, rows: Array, labelledby: String, empty: String, sortedBy: String, descending: Boolean },
  emits: ["act", "sort"],
  methods: {
    sorting(column) {
      if (!column.sortable) return null;
      return column.key !== this.sortedBy ? "none" : this.descending ? "descending" : "ascending";
    },
  },
  template: `
    <div>
      <p v-if="!rows.length" class="empty">{{ empty }}</p>
      <table v-show="rows.length" role="table" :aria-labelledby="labelledby">
        <thead role="rowgroup">
          <tr role="row">
            <th v-for="column in columns" :key="column.key" role="columnheader" scope="col"
                :class="column.css" :aria-sort="sorting(column)">
              <button v-if="column.sortable" type="button" class="sort" @click="$emit('sort', column.key)">{{
                column.label }}</button>
              <template v-else>{{ column.label }}</template>
            </th>
          </tr>
        </thead>
        <tbody role="rowgroup">
          <tr v-for="row in rows" :key="row.key" role="row" :class="row.css">
            <component v-for="(cell, index) in row.cells" :is="index ? 'td' : 'th'" :key="columns[index].key"
                :role="index ? 'cell' : 'rowheader'" :scope="index ? null : 'row'" :data-label="columns[index].label"
                :class="[columns[index].css, cell.css]">
              <template v-if="typeof cell === 'string'">{{ cell }}</template>
              <template v-else>
                <a v-if="cell.href" :href="cell.href" :download="cell.download">{{ cell.text }}</a>
                <button v-else-if="cell.act" type="button" :aria-label="cell.label"
                  @click="$emit('act', [cell.act, row.key])">{{ cell.text }}</button>
                <span v-else :title="cell.title">{{ cell.text }}</span>
                <small v-if="cell.sub">{{ cell.sub }}</small>
              </template>
            </component>
          </tr>
        </tbody>
      </table>
    </div>`,
};
