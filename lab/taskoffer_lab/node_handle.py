"""placeholder"""


class Node: ...
