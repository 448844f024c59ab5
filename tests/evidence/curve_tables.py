def tables(data, work):
    return ""
